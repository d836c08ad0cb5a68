"""Stage 0: what the device can do at most, by torch alone."""
