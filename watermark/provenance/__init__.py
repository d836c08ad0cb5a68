"""What a picture's file says of its origin: metadata, XMP and C2PA manifests."""
