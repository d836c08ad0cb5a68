"""Provenance in image files: PNG text, XMP packets and C2PA manifests."""
