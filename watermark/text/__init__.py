"""Text in pictures: fonts, scripts, line breaks, typesetting, and what is drawn over a picture."""
