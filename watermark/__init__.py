"""What is drawn on a picture and written into its file: signature, text, provenance."""
