"""`darkroom check`: every part tried for real. One file a part; `command` runs all of them."""
