"""The engine: a request in, pictures out. Only `engine` and what it imports touch torch; the supervisor never does."""
