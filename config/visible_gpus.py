"""Resolve `DEVICE` within `CUDA_VISIBLE_DEVICES`. Pure: no call to the driver."""

import re

# The value that hides every GPU from CUDA.
HIDDEN = "-1"
# Prefixes of the UUIDs of a whole GPU and of a MIG slice.
UUID_PREFIXES = ("GPU-", "MIG-")


def visible_gpu(device: str, cuda_visible_devices: str | None) -> str | None:
    """Compute the `CUDA_VISIBLE_DEVICES` that shows the GPU of `DEVICE` alone, as CUDA's first and only one.

    `cuda:N` counts within the list where there is one, else in PCI order. None where neither names a GPU: the first of
    all. `HIDDEN` where the list hides every GPU. Raises `ValueError` where N is beyond the list.
    """
    number = int(device.partition(":")[2] or 0)
    if cuda_visible_devices is None:
        return str(number) if ":" in device else None
    listed = _listed(cuda_visible_devices)
    if number < len(listed):
        return listed[number]
    if number == 0:
        return HIDDEN
    named = f"names {len(listed)} of them" if listed else "hides every GPU"
    raise ValueError(f"{device} counts within CUDA_VISIBLE_DEVICES={cuda_visible_devices}, which {named}")


def gpu_variables(device: str, cuda_visible_devices: str | None) -> dict[str, str]:
    """Build the environment of a process that runs on the GPU of `DEVICE`; empty for the CPU."""
    if device == "cpu":
        return {}
    visible = visible_gpu(device, cuda_visible_devices)
    # NVML counts in PCI order; CUDA's own order begins with the fastest GPU.
    variables = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return variables if visible is None else variables | {"CUDA_VISIBLE_DEVICES": visible}


def _listed(cuda_visible_devices: str) -> list[str]:
    """Return the entries that CUDA accepts: those before the first invalid one, and none where one is repeated.

    UUIDs are unchanged; of an index the digits that CUDA reads are kept.
    """
    entries = [entry.strip() for entry in cuda_visible_devices.split(",")]
    prefix = next((one for one in UUID_PREFIXES if entries[0].startswith(one)), "")
    taken: list[str] = []
    for entry in entries:
        if prefix:
            name = entry if entry.startswith(prefix) else None
        else:
            digits = re.match(r"\+?(\d+)", entry, re.ASCII)
            name = str(int(digits[1])) if digits else None
        if name is None:
            break
        if name in taken:
            return []
        taken.append(name)
    return taken
