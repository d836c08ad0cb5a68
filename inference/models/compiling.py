"""Regional compilation: the denoiser's repeated blocks, each kind of them compiled once for batches of any shape."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.fx.experimental import _config as shapes_config

from inference.checkpoints.hub import one_line
from inference.errors import EngineStartFailed

# Graphs of one block's code: for each width, with one row and with several, with and without a mask.
MAX_GRAPHS = 64
# Of torch.compile: what generates code, and its stance once the blocks are sealed.
BACKEND = "inductor"
SEALED_STANCE = "eager_on_recompile"
ADVICE = (
    "on a CPU it needs a C++ compiler (g++), on a GPU gcc and Python's headers (python3-dev); COMPILE=off needs neither"
)


class BlockCompiler:
    """Owner of the compiled blocks. One thread runs them, and one engine of a process has some."""

    def __init__(self) -> None:
        self._is_compiling = False
        self._is_sealed = False

    def compile(self, denoiser: Any) -> None:
        """Compile the denoiser's blocks at their next forwards, until `seal`: a graph for each kind of batch."""
        # Shapes are symbols from the first forward on, or each new size would be compiled until the second.
        denoiser.compile_repeated_blocks(backend=BACKEND, fullgraph=True, dynamic=True)
        self._is_compiling = True

    def seal(self) -> None:
        """Compile nothing more: a batch that fits no graph runs as it would without them, and waits for none."""
        self._is_compiling, self._is_sealed = False, True

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run the blocks inside as they are now to be run. EngineStartFailed where they cannot be compiled.

        Torch's configuration belongs to a thread, and its stance to the process: both are what they were on exit.
        """
        if self._is_compiling:
            # Otherwise two sizes that are equal in the first batch are one symbol, and a batch in which they differ has
            # no graph.
            with (
                dynamo_config.patch(recompile_limit=MAX_GRAPHS),
                shapes_config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
                _failures_translated(),
            ):
                yield
        elif self._is_sealed:
            with torch.compiler.set_stance(SEALED_STANCE):
                yield
        else:
            yield


@contextmanager
def _failures_translated() -> Iterator[None]:
    try:
        yield
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        if isinstance(error.__cause__ or getattr(error, "inner_exception", None), torch.OutOfMemoryError):
            raise torch.OutOfMemoryError(str(error)) from error
        reason = f"COMPILE=blocks: the denoiser's blocks cannot be compiled ({one_line(error)})"
        raise EngineStartFailed(f"{reason}: {ADVICE}") from error
