"""Compile the kernel of adapters for GPUs that are not here, and print what of them a block of threads takes.

`python -m tests.support.cuda.kernel_assembly` prints a table, and a last line of JSON.
"""

import json
import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from inference.lora.layers import PAGE_RANK
from inference.lora.products.kernels import add_pages
from inference.lora.products.paged_products import TILES, TILES_IN_32_BITS

CAPABILITIES = (80, 89, 90)
DTYPES = ("bf16", "fp16", "fp32")
POINTERS = {"table": "*i32", "pages": "*i32", "scales": "*fp32"}
TENSORS = ("x", "slab", "output_0", "output_1", "output_2")
# Widths of published models are multiples of it, and tensors begin at one: then numbers are loaded several at a time.
ALIGNMENT = 16


class Usage(NamedTuple):
    """What a block of threads takes on one kind of GPU."""

    capability: int
    dtype: str
    num_registers: int
    shared_bytes: int
    spilled_bytes: int


def usage_of(capability: int, dtype: str) -> Usage:
    """Compile the kernel, and have NVIDIA's assembler tell its registers."""
    constants = {"PAGE_RANK": PAGE_RANK} | (TILES_IN_32_BITS if dtype == "fp32" else TILES)
    names = [name for name in add_pages.arg_names if name not in constants]
    signature: dict[str, Any] = {name: POINTERS.get(name, f"*{dtype}" if name in TENSORS else "i32") for name in names}
    aligned = [
        name for name in names if name in TENSORS or name.startswith(("fan_", "page_width", "a_start", "b_start"))
    ]
    attributes = {(names.index(name),): [["tt.divisibility", ALIGNMENT]] for name in aligned}
    source = ASTSource(add_pages, signature | dict.fromkeys(constants, "constexpr"), constants, attributes)
    made: Any = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(made.asm["ptx"])
        ptx.flush()
        assembler = triton.knobs.nvidia.ptxas.path
        arch = f"sm_{capability}a" if capability == 90 else f"sm_{capability}"
        command = [assembler, "-v", f"--gpu-name={arch}", ptx.name, "-o", "/dev/null"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", printed)
    spilled = re.findall(r"(\d+) bytes spill", printed)
    assert registers, printed
    return Usage(capability, dtype, int(registers[1]), made.metadata.shared, sum(map(int, spilled)))


def main() -> None:
    """Print the table."""
    usages = [usage_of(capability, dtype) for dtype in DTYPES for capability in CAPABILITIES]
    print(f"{'sm':>4} {'dtype':6} {'registers':>9} {'shared':>8} {'spilled':>8}")
    for one in usages:
        print(f"{one.capability:4} {one.dtype:6} {one.num_registers:9} {one.shared_bytes:8} {one.spilled_bytes:8}")
    print(json.dumps([one._asdict() for one in usages]))


if __name__ == "__main__":
    main()
