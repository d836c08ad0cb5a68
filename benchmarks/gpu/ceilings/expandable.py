"""Do expandable segments work here? `python -m benchmarks.gpu.ceilings.expandable PARENT_PID` prints True or False.

They need the driver's virtual memory management, which some sandboxes lack.
"""

import sys

import torch

from benchmarks.gpu.processes import die_with_parent

FIRST_BYTES, SECOND_BYTES = 200 << 20, 900 << 20


def main() -> None:
    """Allocate memory, grow, and read from the allocator what kind of segments it has taken."""
    die_with_parent(int(sys.argv[1]))
    first = torch.ones(FIRST_BYTES, dtype=torch.uint8, device="cuda")
    del first
    second = torch.ones(SECOND_BYTES, dtype=torch.uint8, device="cuda")
    assert int(second.sum(dtype=torch.int64)) == SECOND_BYTES
    segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    print(any(segment["is_expandable"] for segment in segments))


if __name__ == "__main__":
    main()
