"""The engine: a request in, pictures out. Only `engine` and what it imports touch torch; the supervisor never does."""

import os

# Before anybody imports them: the libraries speak while they are imported, and a log is one line of JSON an event.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
