"""What the second pass of a step must see as the first did: the same dropout, the same running statistics."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from outlast._core._norm import BufferSnapshot


class RandomState:
    """The state of torch's generators on the CPU and on the devices of some tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._cpu = torch.get_rng_state()
        devices = {tensor.device for tensor in tensors} - {torch.device("cpu")}
        self._devices = [(device, torch.get_device_module(device).get_rng_state(device)) for device in devices if device.type != "meta"]

    def restore(self) -> None:
        """Put the generators back to the kept state."""
        torch.set_rng_state(self._cpu)
        for device, state in self._devices:
            torch.get_device_module(device).set_rng_state(state, device)


class LocalGradients:
    """Keeps the gradients of DistributedDataParallel modules local for the passes inside.

    A global forward pre-hook finds those modules, so none has to be handed in: DDP decides at its forward pass whether
    the coming backward pass reduces. They stay in ``kept_local``.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._hook: RemovableHandle | None = None
        self._unsynced: list[DistributedDataParallel] = []
        self.kept_local: list[DistributedDataParallel] = []
        self._seen: dict[int, nn.Module] = {}

    def __enter__(self) -> LocalGradients:
        if self._wanted():
            self._hook = register_module_forward_pre_hook(self._watch)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._hook is not None:
            self._hook.remove()
        for module in self._unsynced:
            module.require_backward_grad_sync = True
        self._unsynced.clear()

    def _wanted(self) -> bool:
        return self._enabled and torch.distributed.is_available() and torch.distributed.is_initialized()

    def _watch(self, module: nn.Module, _inputs: object) -> None:
        if id(module) in self._seen:
            return
        for part in module.modules():  # a compiled module does not run its parts one by one, so take the whole tree
            self._seen.setdefault(id(part), part)
            if self._enabled and isinstance(part, DistributedDataParallel) and part.require_backward_grad_sync:
                part.require_backward_grad_sync = False
                self._unsynced.append(part)
                self.kept_local.append(part)


class FirstPass(LocalGradients):
    """Watches the pass at the unperturbed weights: which modules run, and from which random state.

    With ``known`` modules no hook is needed to find them.
    """

    def __init__(self, parameters: Iterable[Tensor], *, local: bool, known: Iterable[nn.Module] = ()) -> None:
        super().__init__(enabled=local)
        self._parameters = list(parameters)
        self._known = list(known)
        self._buffers: BufferSnapshot | None = None
        self._before: RandomState | None = None
        self._after: RandomState | None = None

    def __enter__(self) -> FirstPass:
        self._before = RandomState(self._parameters)
        if not self._known:
            _silence_compile()
        super().__enter__()
        return self

    def _wanted(self) -> bool:
        return not self._known or super()._wanted()

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that ran, or those known before."""
        return self._known or list(self._seen.values())

    def begin_second(self, *, freeze_buffers: bool, same_rng: bool) -> None:
        """Keep buffers and generators as the first pass left them, then rewind the generators for the next pass."""
        if freeze_buffers and self._buffers is None:
            self._buffers = BufferSnapshot(self.modules)
        if same_rng and self._before is not None:
            if self._after is None:
                self._after = RandomState(self._parameters)
            self._before.restore()

    def end_second(self) -> None:
        """Leave buffers and generators where the first pass left them."""
        if self._buffers is not None:
            self._buffers.restore()
        if self._after is not None:
            self._after.restore()


_COMPILE_WARNING = r"Using `torch\.compile\(module\)` when there are global hooks"


def _silence_compile() -> None:
    """Keep torch.compile from warning about our hook, which reads the module tree once.

    A filter that stays: entering and leaving ``catch_warnings`` at every step would show a user's own warnings again.
    """
    if not any(message is not None and getattr(message, "pattern", message) == _COMPILE_WARNING for _, message, *_ in warnings.filters):
        warnings.filterwarnings("ignore", message=_COMPILE_WARNING)
