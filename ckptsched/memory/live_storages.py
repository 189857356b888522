"""Which tensors are alive while a program runs, by the modules that made them.

Each operation is watched by a `TorchDispatchMode`, in the forward, in the backward and in an
optimizer's step. A storage counts from the operation that made it until it is freed, which a weak
reference tells; nothing is kept alive.
"""

from __future__ import annotations

import enum
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from ..tensors.wrapper_tensors import all_parts
from ..torch_state.locks import in_engine

_FOREVER = 1 << 62


class Kind(enum.Enum):
    """What a storage is for, in the words that tables show."""

    PARAMETERS = "parameters"
    BUFFERS = "buffers"
    PARAMETER_GRADIENTS = "parameter gradients"
    OPTIMIZER_STATE = "optimizer state"
    """And what an optimizer takes during its step, of no module."""
    ACTIVATIONS = "activations"
    """Made in a forward: kept for the backward, or held by the program."""
    GRADIENTS = "gradients of activations"
    """Made in a backward, and no parameter's gradient."""
    GIVEN = "batch and other tensors from before"
    """Used, and not made, by what was watched."""
    ELSEWHERE = "made outside the model"
    """Such as the loss and a batch that is made inside."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LiveBytes:
    """Storages of one kind that one module made, alive at one time."""

    kind: Kind
    """What they are for."""
    module: str
    """Path of the innermost module at work, or that owns them; "" for none."""
    bytes: int
    """Their bytes."""
    storages: int
    """How many they are."""


@final
class _Record:
    """One storage, from an event to an event."""

    __slots__ = ("born", "bytes", "died", "kind", "module", "reference")

    def __init__(self, kind: Kind, module: str, size: int, born: int) -> None:
        self.kind, self.module, self.bytes = kind, module, size
        self.born, self.died = born, _FOREVER
        self.reference: weakref.ref[Any] | None = None


@final
class LiveStorages(TorchDispatchMode):
    """Watches the tensors that a model, its backward and its optimizers make.

    Enter it around a step. A storage that had been there counts from when it is first used, but for
    what the model and the optimizers own, which counts all the time.

    Args:
        model: Its modules' paths name what they make.
        optimizers: Those whose state there is already; others are found when they step.
        by_module: Whether to tell modules apart, by hooks of all modules of the process; else what
            is made while the model is at work is the whole model's.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Iterable[torch.optim.Optimizer] = (),
        *,
        by_module: bool = True,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model, self._by_module = model, by_module
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._records: list[_Record] = []
        self._known: dict[int, _Record] = {}
        self._clock = self._live = 0
        self.peak_bytes, self._peak_clock = 0, 0
        self._failed_clock: int | None = None
        self._stack: list[str] = []
        self._going_back = ""
        self._marked: dict[int, weakref.ref[Tensor]] = {}
        self._stepping = False
        self._stood = ExitStack()
        self._own(optimizers)

    # -- what is alive

    @property
    def live_bytes(self) -> int:
        """Bytes of what is alive now."""
        return self._live

    def at_peak(self) -> tuple[LiveBytes, ...]:
        """What was alive when most bytes were, largest first."""
        return self._alive(self._peak_clock)

    def now(self) -> tuple[LiveBytes, ...]:
        """What is alive now, largest first."""
        return self._alive(self._clock)

    def at_failure(self) -> tuple[LiveBytes, ...]:
        """What was alive when an operation failed last, or is now where none has."""
        return self._alive(self._clock if self._failed_clock is None else self._failed_clock)

    def _alive(self, clock: int) -> tuple[LiveBytes, ...]:
        self._claim_gradients()
        found: dict[tuple[Kind, str], list[int]] = {}
        for record in self._records:
            if record.born <= clock < record.died:
                found.setdefault((record.kind, record.module), []).append(record.bytes)
        parts = [
            LiveBytes(kind=kind, module=module, bytes=sum(sizes), storages=len(sizes))
            for (kind, module), sizes in found.items()
        ]
        return tuple(sorted(parts, key=lambda part: -part.bytes))

    # -- watching

    def __enter__(self) -> LiveStorages:
        """Watch from now on."""
        with ExitStack() as stack:
            undo = [register_optimizer_step_pre_hook(self._steps)]
            undo += [register_optimizer_step_post_hook(self._stepped)]
            if self._by_module:
                undo += [register_module_forward_pre_hook(self._enters)]
                undo += [register_module_forward_hook(self._leaves, always_call=True)]
            else:
                undo += [self._model.register_forward_pre_hook(self._enters, prepend=True)]
                undo += [self._model.register_forward_hook(self._leaves, always_call=True)]
            for handle in undo:
                stack.callback(handle.remove)
            super().__enter__()  # type: ignore[no-untyped-call]
            self._stood = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        """Watch no longer; what is alive then is still told."""
        with self._stood:
            super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._claim_gradients()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, and note what it takes and what it makes."""
        for tensor in _tensors((args, kwargs)):
            self._note(tensor, Kind.GIVEN, "")
        try:
            result = func(*args, **(kwargs or {}))
        except BaseException:
            self._failed_clock = self._clock  # what is alive then goes as the error is handed on
            raise
        kind, module = self._at_work()
        for tensor in _tensors(result):
            self._note(tensor, kind, module)
        return result

    def _at_work(self) -> tuple[Kind, str]:
        if self._stepping:
            return Kind.OPTIMIZER_STATE, ""
        if in_engine():
            return Kind.GRADIENTS, self._stack[-1] if self._stack else self._going_back
        return (Kind.ACTIVATIONS, self._stack[-1]) if self._stack else (Kind.ELSEWHERE, "")

    def _note(self, tensor: Tensor, kind: Kind, module: str) -> None:
        for storage in _storages(tensor):
            key = storage._cdata
            record = self._known.get(key)
            # A storage whose size has changed since counts anew: sharded parameters are such.
            if record is not None and record.bytes != storage.nbytes():
                self._gone(record, key)
                kind, module, record = record.kind, record.module, None
            if record is None and storage.nbytes():
                self._born(storage, key, kind, module)

    def _born(self, storage: torch.UntypedStorage, key: int, kind: Kind, module: str) -> None:
        self._clock += 1
        record = _Record(kind, module, storage.nbytes(), self._clock)
        record.reference = weakref.ref(storage, self._ender(record, key))
        self._records.append(record)
        self._known[key] = record
        self._live += record.bytes
        if self._live > self.peak_bytes:
            self.peak_bytes, self._peak_clock = self._live, self._clock

    def _ender(self, record: _Record, key: int) -> Callable[[object], None]:
        watch = weakref.ref(self)

        def end(_: object) -> None:
            found = watch()
            if found is not None:
                found._gone(record, key)

        return end

    def _gone(self, record: _Record, key: int) -> None:
        if record.died == _FOREVER:
            self._clock += 1
            record.died = self._clock
            self._live -= record.bytes
            if self._known.get(key) is record:
                del self._known[key]

    # -- who is at work

    def _enters(self, module: nn.Module, args: Any) -> None:
        path = self._paths.get(id(module))
        above = self._stack[-1] if self._stack else ""
        self._mark(args, above)  # where its backward is over
        self._stack.append(above if path is None else path or type(module).__name__)
        if path == "":
            self._claim_gradients()

    def _leaves(self, module: nn.Module, args: Any, output: Any) -> None:
        path = self._stack.pop() if self._stack else ""
        self._mark(output, path)

    def _mark(self, tensors: Any, path: str) -> None:
        """Have the gradients of tensors tell whose backward begins as they arrive.

        Of several modules with one output that is the innermost, which ends first.
        """
        for tensor in _tensors(tensors):
            if tensor.requires_grad and not tensor.is_leaf and not in_engine():
                key = id(tensor)
                if key not in self._marked:
                    self._marked[key] = weakref.ref(tensor, functools.partial(self._unmark, key))
                    hook: Any = tensor.register_hook
                    hook(self._arrival(path))

    def _unmark(self, key: int, _: object) -> None:
        self._marked.pop(key, None)

    def _arrival(self, path: str) -> Callable[[Tensor], None]:
        watch = weakref.ref(self)

        def arrives(_: Tensor) -> None:
            found = watch()
            if found is not None:
                found._going_back = path

        return arrives

    def _steps(self, optimizer: torch.optim.Optimizer, *call: Any) -> None:
        self._claim_gradients()
        self._own([optimizer])
        self._stepping = True

    def _stepped(self, optimizer: torch.optim.Optimizer, *call: Any) -> None:
        self._stepping = False
        self._own([optimizer])

    # -- what belongs to whom

    def _own(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        names = {}
        for name, parameter in self._model.named_parameters():
            names[id(parameter)] = name.rpartition(".")[0]
            self._claim(parameter, Kind.PARAMETERS, names[id(parameter)])
        for name, buffer in self._model.named_buffers():
            self._claim(buffer, Kind.BUFFERS, name.rpartition(".")[0])
        for optimizer in optimizers:
            for owner, state in optimizer.state.items():
                for tensor in _tensors(state):
                    self._claim(tensor, Kind.OPTIMIZER_STATE, names.get(id(owner), ""))
        self._claim_gradients()

    def _claim_gradients(self) -> None:
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None:
                module = name.rpartition(".")[0]
                self._claim(parameter.grad, Kind.PARAMETER_GRADIENTS, module)

    def _claim(self, tensor: Tensor, kind: Kind, module: str) -> None:
        self._note(tensor, kind, module)
        for storage in _storages(tensor):
            record = self._known.get(storage._cdata)
            if record is not None and record.kind is not Kind.PARAMETERS:
                record.kind, record.module = kind, module


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from _tensors(getattr(value, name, None))


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    for part in all_parts([tensor]):
        if part.layout is torch.strided and part.device.type != "meta":
            try:
                yield part.untyped_storage()
            except (RuntimeError, NotImplementedError):  # a tensor without a storage has no bytes
                continue
