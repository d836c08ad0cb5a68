"""Text on images: fonts, scripts, line breaks, typesetting, and the drawing of headlines."""
