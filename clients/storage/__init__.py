"""S3-compatible object stores: locations, reads and writes, errors, and the download cache."""
