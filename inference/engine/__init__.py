"""The engine's loop and what it needs around it: admission, batching, conditioning, decoding, previews."""
