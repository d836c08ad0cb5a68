"""Models of full size without a file."""
