"""`darkroom check`: every part tried for real. Each file knows one part, `command` all of them."""
