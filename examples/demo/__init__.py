"""`make demo`: the whole way on this machine, with real parts and a model small enough for two CPU cores."""
