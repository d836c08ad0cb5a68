"""Which GPU `DEVICE` means among those that `CUDA_VISIBLE_DEVICES` names. Pure: no driver is asked."""

import re

# What CUDA takes for "no GPU at all".
HIDDEN = "-1"
# The beginnings of the two kinds of UUID: of a whole GPU, and of a slice of one.
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
    """Build the environment of a process that is to draw on the GPU of `DEVICE`; empty where the CPU draws."""
    if device == "cpu":
        return {}
    visible = visible_gpu(device, cuda_visible_devices)
    # NVML counts in PCI order; CUDA's own order begins with the fastest GPU.
    variables = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return variables if visible is None else variables | {"CUDA_VISIBLE_DEVICES": visible}


def _listed(cuda_visible_devices: str) -> list[str]:
    """The entries that CUDA takes: up to the first that is none, and none at all where one is there twice."""
    entries = [entry.strip() for entry in cuda_visible_devices.split(",")]
    prefix = next((one for one in UUID_PREFIXES if entries[0].startswith(one)), "")
    taken: list[str] = []
    for entry in entries:
        name = _name(entry, prefix)
        if name is None:
            break
        if name in taken:
            return []
        taken.append(name)
    return taken


def _name(entry: str, prefix: str) -> str | None:
    """A UUID as it stands, an index as the digits that CUDA reads of it; None: CUDA reads no further."""
    if prefix:
        return entry if entry.startswith(prefix) else None
    digits = re.match(r"\+?(\d+)", entry, re.ASCII)
    return str(int(digits[1])) if digits else None
