"""`darkroom check`: every part tried for real. Each file knows one part, `everything` all of them."""
