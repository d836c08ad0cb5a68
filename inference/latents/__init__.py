"""Latents of source images, and small images of latents."""
