"""Messages in and out: schemas, decoding, validation."""
