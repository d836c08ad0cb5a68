"""Decoding of uploads, signature and text overlays, product compositing, and provenance metadata of images."""
