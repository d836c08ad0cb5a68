"""`python -m examples.demo_model.recipe`: the demo model from nothing, or from where the last run was interrupted."""

import argparse
import os
import sys
from pathlib import Path

# glibc must be told before the process starts. It hands large blocks back to the kernel at once, and every tensor of
# a step would be faulted in anew, which takes longer than computing it. A second thread's own arena would do the same.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_ARENA_MAX": "1",
}
# The workers are the threads; see `workers.py`.
THREADS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ENVIRONMENT = {**ALLOCATOR, **THREADS, "HF_HUB_OFFLINE": "1"}


def main() -> int:
    options = _parse()
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        module = [sys.executable, "-m", "examples.demo_model.recipe", *sys.argv[1:]]
        os.execve(sys.executable, module, os.environ | ENVIRONMENT)  # noqa: S606

    # Only now: torch and its libraries are the process that the environment is for.
    from examples.demo_model.recipe.settings import FULL, QUICK, Workspace  # noqa: PLC0415
    from examples.demo_model.recipe.stages import install, run_stages  # noqa: PLC0415
    from examples.demo_model.recipe.workers import choose_device  # noqa: PLC0415

    out = options.out or Path("out") / ("demo_model_quick" if options.quick else "demo_model")
    budget = (QUICK if options.quick else FULL).with_effort(options.effort)
    workspace = Workspace(out, budget, choose_device(options.device))
    run_stages(workspace)
    if options.install:
        install(workspace)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo_model.recipe", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the results (default: out/demo_model)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--effort", type=float, default=1.0, help="train for this share of the steps")
    parser.add_argument("--quick", action="store_true", help="every stage for seconds: the model will draw nothing")
    parser.add_argument("--install", action="store_true", help="copy the result over the bundled model at the end")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
