"""Run the engine's CUDA path where there is no CUDA, and record its kernels, copies and waits.

Tensors on "cuda:0" are torch's fake tensors: they have shapes, dtypes and a device but no memory, so that full-size
models cost nothing. Tensors on the CPU stay real, and with them schedulers, generators and tokenizers. What comes back
from the device is zeros. `python -m tests.support.cuda.fake_cuda` prints how many kernels a denoise step launches.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.weak import WeakTensorKeyDictionary

from inference.lora.products import paged_products
from tests.support.cuda import roofline
from tests.support.cuda.cuda_stand_ins import guarded, replaced, replacements
from tests.support.cuda.operators import (
    is_composed,
    is_made_of_tensors,
    is_mask,
    is_on_device,
    likeness,
    outline,
    tensors_in,
)
from tests.support.cuda.roofline import Launch
from tests.support.cuda.tally import Event, Tally, line_at_work

DEVICE = torch.device("cuda:0")

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
# One kernel each, whatever torch composes them of.
WHOLE = frozenset({ATTENTION, aten.upsample_nearest2d.vec})
# No kernel runs: they make memory, or a view that is not called one.
NO_KERNEL = frozenset(
    {
        aten._unsafe_view.default,
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.empty_strided.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)
PINNING = frozenset({aten.pin_memory.default, aten._pin_memory.default})
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class CachedEffect(NamedTuple):
    """Cached effect of an operator on arguments like these: its kernels with their work, and what it returned. A number
    is the index of the argument that was returned.
    """

    launches: tuple[Launch, ...]
    made: Any


class FakeCuda(FakeTensorMode):
    """The dispatch mode. Owner of what is known of pinned memory, and of the running tally. Enter `installed()`, not
    this."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._pinned = WeakTensorKeyDictionary()
        self._effects: dict[Any, CachedEffect] = {}
        self._launched: list[Launch] = []
        self._tally = Tally()
        self._part = "outside"
        self._is_inside = False  # an operator that torch composes of others
        self._is_host_fake = False
        self._handlers = {
            aten.dropout.default: self._dropped_out,
            aten._local_scalar_dense.default: self._answered,
            aten.equal.default: self._answered,
            aten.nonzero.default: self._found,
            ATTENTION: self._attended,
            aten._to_copy.default: self._copied,
            aten.copy_.default: self._copied_over,
        } | dict.fromkeys(INDEXING, self._indexed)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let "cuda:0" be a device inside, and torch be as it was afterwards. As the engine does, without autograd."""
        with ExitStack() as stack:
            stack.enter_context(guarded())
            for replacement in replacements(self.note_sync):
                stack.enter_context(replaced(*replacement))
            # Triton launches nothing without a driver.
            stack.enter_context(replaced(paged_products, "launch", self._launched_by_triton))
            stack.enter_context(torch.inference_mode())
            stack.enter_context(self)
            yield

    @contextmanager
    def counting(self) -> Iterator[Tally]:
        """Tally what runs inside."""
        before, self._tally = self._tally, Tally()
        self._part = "outside"  # a forward may have ended in an error
        try:
            yield self._tally
        finally:
            self._tally = before

    @contextmanager
    def without_host_memory(self) -> Iterator[None]:
        """Make tensors created on the CPU inside fake too: for large ones that are never read."""
        self._is_host_fake = True
        try:
            yield
        finally:
            self._is_host_fake = False

    def watch(self, module: torch.nn.Module, part: str) -> None:
        """Count the kernels of `module`'s forwards as those of `part`, also inside a module of another part."""
        before: list[str] = []

        def enter(*_: Any) -> None:
            before.append(self._part)
            self._part = part

        def leave(*_: Any) -> None:
            self._part = before.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def __torch_dispatch__(  # type: ignore[override]
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._is_inside:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if func is aten.is_pinned.default:
            return args[0] in self._pinned
        if func in PINNING:
            return self._pin(args[0].clone())
        is_pinned = bool(kwargs.get("pin_memory"))
        if is_pinned:
            kwargs = kwargs | {"pin_memory": False}
        tensors = list(tensors_in((*args, *kwargs.values())))
        if self._is_real(tensors, kwargs.get("device")):
            made = self._decomposed(func, args, kwargs) if is_composed(func) else func(*args, **kwargs)
        else:
            made = self._remembered(func, types, args, kwargs)
        for view in tensors_in((made,)):
            if is_pinned or (tensors and func.is_view and tensors[0] in self._pinned):
                self._pin(view)
        return made

    def _is_real(self, tensors: list[torch.Tensor], device: Any) -> bool:
        """Return whether nothing is on the device, and nothing is to get there."""
        is_bound_there = device is not None and torch.device(device).type == "cuda"
        return not (is_bound_there or self._is_host_fake or any(isinstance(one, FakeTensor) for one in tensors))

    def _remembered(self, func: Any, types: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call `_made`, which is slow, or reuse what it returned for arguments of the same shapes."""
        key = (func, *map(likeness, args), *((name, likeness(value)) for name, value in kwargs.items()))
        effect = self._effects.get(key)
        if effect is not None:
            self._launch(*effect.launches)
            return self._again(effect.made, args)
        num_events, num_launched = len(self._tally.events), len(self._launched)
        made = self._made(func, types, args, kwargs)
        if num_events == len(self._tally.events) and is_made_of_tensors(made):
            self._effects[key] = CachedEffect(tuple(self._launched[num_launched:]), outline(made, args))
        return made

    def _again(self, made: Any, args: Sequence[Any]) -> Any:
        """Make anew what was returned before."""
        match made:
            case int():
                return args[made]
            case list():
                return [self._again(one, args) for one in made]
            case _:
                shape, stride, dtype, device = made
                return FakeTensor(self, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)

    def _made(self, func: Any, types: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if func in self._handlers:
            return self._handlers[func](func, types, args, kwargs)
        if func not in WHOLE and is_composed(func):
            return self._decomposed(func, args, kwargs)
        return self._ran(func, types, args, kwargs)

    def _ran(self, func: Any, types: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        made = self._faked(func, types, args, kwargs)
        if func not in NO_KERNEL and not func.is_view and is_on_device(made, args):
            self._launch(roofline.launch_of(func, args, kwargs, made))
        return made

    def _launch(self, *launches: Launch) -> None:
        self._launched += launches
        self._tally.add(self._part, launches)

    def _launched_by_triton(self, grid: tuple[int, int, int], *args: Any, **constants: int) -> None:
        if any(one.device != DEVICE or not one.is_contiguous() for one in tensors_in(args[:1])):
            raise RuntimeError("the kernel reads contiguous tensors on the device")
        if {one.device for one in tensors_in(args)} != {DEVICE}:
            raise RuntimeError("the kernel was given a tensor that is not on the device")
        self._launch(roofline.adapters(grid, args, constants["BLOCK_TOKENS"]))

    def _decomposed(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        with self:
            return func.decompose(*args, **kwargs)

    def _faked(self, func: Any, types: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        self._is_inside = True
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._is_inside = False

    # What is not run as it is: all take an operator and its arguments.

    def _dropped_out(self, func: Any, types: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return self._decomposed(func, args, kwargs) if args[2] else args[0]

    def _answered(self, func: Any, _: Any, args: Sequence[Any], __: dict[str, Any]) -> Any:
        if args[0].device.type == "cuda":
            self.note_sync(func.overloadpacket.__name__)
        return True if func is aten.equal.default else torch.ones((), dtype=args[0].dtype).item()

    def _found(self, func: Any, types: Any, args: Sequence[Any], _: dict[str, Any]) -> Any:
        """Return as many indices as there can be."""
        self.note_sync(func.overloadpacket.__name__)
        shape = (args[0].numel(), args[0].ndim)
        return self._faked(aten.new_empty.default, types, (args[0], shape), {"dtype": torch.long})

    def _indexed(self, func: Any, types: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        for index in args[1]:
            if index is not None and index.device.type == "cpu" and args[0].device.type == "cuda":
                self._note_copy(index, index, to_host=False, is_blocking=True)
            elif is_mask(index):
                self.note_sync("nonzero of a mask")
        if func is aten.index.Tensor and is_mask(args[1][0]):
            return args[0].flatten(0, args[1][0].ndim - 1).clone()
        return self._ran(func, types, args, kwargs)

    def _attended(self, func: Any, types: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        tensors = list(tensors_in((*args, *kwargs.values())))
        if {one.device for one in tensors} != {DEVICE}:
            raise RuntimeError(f"attention over tensors on {sorted({str(one.device) for one in tensors})}")
        self._launch(roofline.attention(args[0], args[1], is_masked=len(tensors) > 3))
        # In the query's memory format, as the kernels leave it.
        return self._faked(aten.empty_like.default, types, args[:1], {})

    def _copied(self, func: Any, types: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        source, target = args[0], kwargs.get("device") or args[0].device
        if source.device.type == target.type:
            return self._ran(func, types, args, kwargs)
        to_host = target.type == "cpu"
        self._note_copy(source, source, to_host=to_host, is_blocking=not kwargs.get("non_blocking"))
        if to_host and not self._is_host_fake:
            return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        return self._faked(func, types, args, kwargs)

    def _copied_over(self, func: Any, types: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        target, source = args[:2]
        to_host = target.device.type == "cpu"
        if target.device.type == source.device.type:
            return self._ran(func, types, args, kwargs)
        if to_host or source.ndim:  # a lone number is an argument of the kernel
            is_blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            self._note_copy(source, target if to_host else source, to_host=to_host, is_blocking=is_blocking)
        return target if to_host else self._faked(func, types, args, kwargs)

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self._pinned[tensor] = True
        return tensor

    def _note_copy(self, source: torch.Tensor, host: torch.Tensor, *, to_host: bool, is_blocking: bool) -> None:
        if not source.numel():
            return  # torch copies nothing
        what = "download" if to_host else "upload"
        self._tally.events.append(
            Event(what, line_at_work(), str(tuple(source.shape)), host in self._pinned, is_blocking)
        )

    def note_sync(self, name: str) -> None:
        """Record that the host waits for the device."""
        self._tally.events.append(Event("sync", line_at_work(), name))


if __name__ == "__main__":
    from tests.support.cuda.kernel_table import main

    main()
