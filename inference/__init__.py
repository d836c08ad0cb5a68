"""The engine: batched denoising of many requests on one resident model.

The supervisor imports only modules that do not import torch.
"""

import os

# Set before the libraries are imported: they log during import, and our log is one line of JSON an event.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
