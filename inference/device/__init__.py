"""The device: its memory, its kernels, and copies to and from it that do not block."""
