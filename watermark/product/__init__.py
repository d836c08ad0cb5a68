"""Product images: cutout, masks, placement and compositing. Pure: images in, images out."""
