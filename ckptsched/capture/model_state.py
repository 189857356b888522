"""Records everything that running a model may change in it, to compare and to restore.

Tensors by their values, wherever they lie; attributes, and the lists, dictionaries and sets among
them, by what they held. So hooks, training modes, counters and caches are covered, too. Objects of
other kinds are looked into one level deep if they come from where the module comes from: what is
known of others, such as a queue that another thread fills, is not enough to put them back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from operator import is_
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from ..base.errors import ProfileError
from ..tensors.comparison import same_values
from ..tensors.pytree import storages
from ..tensors.wrapper_tensors import cannot_be_followed, dense_parts
from ..torch_state.foreign_generators import ForeignGenerators
from ..torch_state.replay_context import RandomState
from .copied_before_writes import storage_of, sum_of_bits, told_of_writes
from .inspection import Inspection

_PARAMETER, _BUFFER, _ATTRIBUTE = "parameter", "buffer", "tensor"
_KINDS = {"_parameters": _PARAMETER, "_buffers": _BUFFER}


_SIMPLE = (type(None), bool, int, float, complex, str, bytes, type)
_CONTAINERS = (dict, list, set, deque, tuple)
_MISSING = object()
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@final
class _Noted:
    """A tensor with the values, version and gradient that it had."""

    __slots__ = ("data", "gradient", "kind", "path", "tensor", "trained", "value", "version")

    def __init__(self, tensor: Tensor, kind: str, path: str, *, copied: bool) -> None:
        self.tensor, self.kind, self.path = tensor, kind, path
        self.trained, self.gradient = tensor.requires_grad, tensor.grad if tensor.is_leaf else None
        self.data = _own(tensor)
        self.value = _copy(self.data) if copied else None
        self.version = _version(tensor)

    def keep(self) -> None:
        """Copy the values, if they are not copied yet."""
        if self.value is None:
            self.value = _copy(self.data)

    def is_changed(self) -> bool:
        """Whether it was written to, if only the same values; code that goes by `.data` is seen."""
        if _version(self.tensor) != self.version:
            return True
        now, before = _own(self.tensor), self.data
        if now.shape != before.shape or now.dtype != before.dtype:
            return True
        return self.value is not None and not _same(now, self.value)

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore the tensor; one that has not changed is not touched."""
        tensor = self.tensor
        now, before = _own(tensor), self.data
        if now.shape != before.shape or now.dtype != before.dtype or not _same_place(now, before):
            tensor.data = before
        if self.value is not None and not _same(before, self.value):
            _own(tensor).copy_(self.value)
        if tensor.is_leaf:
            if tensor.requires_grad != self.trained:
                tensor.requires_grad_(self.trained)
            if tensor.grad is not self.gradient:
                tensor.grad = self.gradient


@torch.no_grad()
def _own(tensor: Tensor) -> Tensor:
    """The tensor without a graph; of one that is spread over processes what lies in this one."""
    local: Any = getattr(tensor, "to_local", None)
    return tensor.detach() if local is None else cast(Tensor, local())


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _copy(tensor: Tensor) -> Tensor | None:
    """The values, in the CPU's memory, which a model on another device leaves free."""
    if tensor.is_meta:
        return None
    try:
        return tensor.to("cpu", copy=True) if tensor.device.type != "cpu" else tensor.clone()
    except (RuntimeError, NotImplementedError):  # of a kind that cannot be copied
        return None


def _same(tensor: Tensor, value: Tensor) -> bool:
    if tensor.is_meta:
        return True
    here = tensor if tensor.device == value.device else tensor.to(value.device)
    try:
        return same_values(here, value)
    except (RuntimeError, NotImplementedError):  # of a kind that cannot be compared
        return False


def _same_place(one: Tensor, other: Tensor) -> bool:
    try:
        return all(
            a.data_ptr() == b.data_ptr() and a.stride() == b.stride()
            for a, b in zip(dense_parts(one), dense_parts(other), strict=True)
        )
    except (RuntimeError, NotImplementedError):  # of a kind without storage
        return True


@final
class ModelState:
    """Tensors, attributes and containers of a model as they are now, to restore them later."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        paths: Sequence[str] = (),
        *,
        whole: ModelState | None = None,
        copied: bool = True,
        lazily: bool = False,
    ) -> None:
        """Note everything.

        Args:
            modules: All modules of the model, or of a part of it. Those that they know otherwise
                than as submodules belong to a model, and not to a part.
            paths: Of the modules; for a whole model alone.
            whole: For a part: the state of the whole model, which has names for what is in the
                part.
            copied: Whether to copy the values of tensors, so that they can be put back.
            lazily: Whether to copy only those that `keep` is told of, before they change.
        """
        self._lazily = lazily
        self._homes: dict[int, list[_Noted]] = {}
        self._sums: dict[int, int] = {}
        self.to_copy: set[int | None] = set()
        """Storages, by identity, that are copied once something writes to them."""
        self._inside = None if whole is None else {id(module) for module in modules}
        self._copied = copied
        self._tensors: dict[int, _Noted] = {}
        self._held: dict[int, tuple[Any, Any, str]] = {}
        self.paths = {id(m): path for m, path in zip(modules, paths, strict=bool(paths))}
        """Path of each module, by its id."""
        self.set_up: set[int] = set()
        """Plain tensors that are written to in a first run alone, by identity."""
        self.unfit = ""
        """Why the model cannot follow a plan, as far as its stages have shown; empty if it can."""
        names = self.paths if whole is None else whole.paths
        for module in modules:
            self._note_module(module, names.get(id(module), type(module).__name__))

    # -- noting

    def _note_module(self, module: nn.Module, path: str) -> None:
        own = vars(module)
        if id(own) in self._held:
            return
        self._held[id(own)] = own, dict(own), path
        origin = type(module).__module__.partition(".")[0]
        # First what has a name of its own: parameters may be listed elsewhere, too.
        for name in ("_parameters", "_buffers"):
            self._note(own[name], _KINDS[name], path, origin)
        for name, value in own.items():
            if not isinstance(value, _SIMPLE):
                place = path if name == "_modules" else _joined(path, name)
                self._note(value, _ATTRIBUTE, place, origin)

    def _note(self, value: Any, kind: str, path: str, origin: str) -> None:
        if isinstance(value, Tensor):
            if id(value) not in self._tensors:
                self._note_tensor(value, kind, path)
        elif isinstance(value, nn.Module):
            if self._inside is None:
                self._note_module(value, self.paths.get(id(value), path))
        elif isinstance(value, _CONTAINERS):
            self._note_container(value, kind, path, origin)
        elif _comes_from(value, origin):
            own = vars(value)
            if id(own) not in self._held:
                self._held[id(own)] = own, dict(own), path
                for name, part in own.items():
                    if isinstance(part, (Tensor, *_CONTAINERS)):
                        self._note(part, kind, _joined(path, name), "")

    def _note_tensor(self, tensor: Tensor, kind: str, path: str) -> None:
        home = storage_of(tensor) if self._lazily and not tensor.is_meta else None
        noted = _Noted(tensor, kind, path, copied=self._copied and home is None)
        self._tensors[id(tensor)] = noted
        if home is not None:
            self._homes.setdefault(home, []).append(noted)
            self.to_copy.add(home)
            if home not in self._sums:
                self._sums[home] = sum_of_bits(noted.data)

    def _note_container(self, value: Any, kind: str, path: str, origin: str) -> None:
        if id(value) in self._held:
            return
        # A tuple cannot change itself, and is noted so that a circle ends.
        self._held[id(value)] = value, dict(value) if isinstance(value, dict) else [*value], path
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for name, part in parts:
            if not isinstance(part, _SIMPLE):
                self._note(part, kind, _joined(path, str(name)), origin)

    def note_gradients(self, leaves: Iterable[Tensor]) -> None:
        """Note the gradients of further tensors, and nothing else of them."""
        for leaf in leaves:
            self._tensors.setdefault(id(leaf), _Noted(leaf, _ATTRIBUTE, "", copied=False))

    def keep(self, tensor: Tensor) -> None:
        """Copy what lies where a tensor does, which is about to be written to.

        Args:
            tensor: Any; nothing happens if its storage is none of the model's.
        """
        home = storage_of(tensor)
        for noted in self._homes.get(home or 0, ()):
            noted.keep()
        self.to_copy.discard(home)

    # -- comparing

    def lost(self) -> str:
        """The first tensor that has changed and was not copied before, in words; empty for none."""
        for home, there in self._homes.items():
            missing = [noted for noted in there if noted.value is None]
            if missing and sum_of_bits(missing[0].data) != self._sums[home]:
                return f"{missing[0].kind} {missing[0].path!r}"
        return ""

    def written(self) -> str:
        """The first parameter or plain tensor that was written to, in words; empty for none.

        Plain tensors that are known to be written to in a first run alone do not count.
        """
        for key, noted in self._tensors.items():
            counts = noted.kind != _BUFFER and noted.path and key not in self.set_up
            if counts and noted.is_changed():
                what = noted.kind if noted.kind == _PARAMETER else "the plain tensor"
                return f"{what} {noted.path!r}"
        return ""

    def note_unfit(self, seen: ModelState, stage: str) -> bool:
        """Note that parameters or plain tensors were written to: such a model follows no plan.

        It is measured to the end, and left as it was.

        Args:
            seen: The state that shows what was written to since it was taken: this one, or that of
                a part.
            stage: By whom, in words.

        Returns:
            Whether any were.
        """
        written = seen.written()
        if written and not self.unfit:
            self.unfit = (
                f"{stage} changes {written} in its forward, so it would be changed once more each "
                "time that the stage runs again; change it outside of the forward, as after "
                "optimizer.step(), or keep it in a buffer: register_buffer (or, if a first run "
                "sets it up, run the model once, under torch.no_grad, before it is profiled)"
            )
        return bool(written)

    def note_set_up(self, part: ModelState) -> bool:
        """Ignore from now on the plain tensors that a stage has written to in its first run.

        Args:
            part: The state of the stage before it, which lets them count no more, either.

        Returns:
            Whether there are any.
        """
        found = {k for k, n in part._tensors.items() if n.kind == _ATTRIBUTE and n.is_changed()}
        part.set_up |= found
        self.set_up |= found
        return bool(found)

    def replaced(self) -> str:
        """The first parameter in whose place another or none is, or that is new, in words."""
        for own, before, path in self._modules():
            now, known = own["_parameters"], self._held[id(before["_parameters"])][1]
            for name in {**known, **now}:
                if now.get(name, _MISSING) is not known.get(name, _MISSING):
                    return f"{_PARAMETER} {_joined(path, name)!r}"
        return ""

    def _modules(self) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
        """What each module holds itself, held before, and its path."""
        for now, before, path in self._held.values():
            if isinstance(before, dict) and isinstance(before.get("_parameters"), dict):
                yield now, before, path

    def rebound(self) -> list[str]:
        """Names of attributes that hold others than before, or were not there."""
        found = []
        for now, before, path in self._modules():
            found += [
                _joined(path, name)
                for name in sorted((now.keys() | before.keys()) - _OF_EVERY_MODULE)
                if now.get(name, _MISSING) is not before.get(name, _MISSING)
            ]
        return found

    def attribute_storages(self) -> dict[int, int]:
        """Bytes of the storages of plain tensors, by an identity that holds while they live."""
        plain = [n.data for n in self._tensors.values() if n.kind == _ATTRIBUTE]
        counted = (t for t in plain if not cannot_be_followed(t, without_data=True))
        found = storages(counted).items()
        return {home: parts[0].untyped_storage().nbytes() for home, parts in found}

    # -- putting back

    def put_back(self) -> None:
        """Restore everything; what has not changed is not touched."""
        for now, before, _ in self._held.values():
            _refill(now, before)
        for noted in self._tensors.values():
            noted.put_back()


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _comes_from(value: Any, origin: str) -> bool:
    """Whether an object is of a class that comes from the same package as a module's."""
    kind = type(value)
    return bool(
        origin
        and origin not in ("torch", "ckptsched")
        and kind.__module__.partition(".")[0] == origin
        and isinstance(getattr(value, "__dict__", None), dict)
        and not isinstance(value, type)
    )


def _refill(now: Any, before: Any) -> None:
    """Restore the contents of a container; it stays the same object."""
    if isinstance(now, dict):
        for name in [name for name in now if name not in before]:
            del now[name]
        for name, value in before.items():
            if now.get(name, _MISSING) is not value:
                now[name] = value
        if list(now) != list(before):
            for name in before:
                now[name] = now.pop(name)
    elif isinstance(now, tuple) or (len(now) == len(before) and all(map(is_, now, before))):
        return
    else:
        now.clear()
        now.update(before) if isinstance(now, set) else now.extend(before)


@contextmanager
def left_as_it_was(
    inspection: Inspection,
    random: RandomState,
    leaves: Iterable[Tensor] = (),
    *,
    lazily: bool = False,
) -> Iterator[tuple[ModelState, Callable[[], None]]]:
    """Restore a model and the random state at the end of a `with` block, however it ends.

    Args:
        inspection: The model.
        random: The random state, as it is.
        leaves: Further tensors whose gradients are put back.
        lazily: Whether to copy tensors only as something writes to them, so that a model takes no
            bytes besides; a mode looks on for that.

    Yields:
        The state, and what puts everything back already in between.

    Raises:
        ProfileError: A tensor has changed without a trace, and was not copied.
    """
    state = ModelState(inspection.modules, inspection.paths, lazily=lazily)
    foreign, is_back = ForeignGenerators.of(inspection.modules), False
    state.note_gradients(leaves)

    def put_back() -> None:
        nonlocal is_back
        is_back = False
        state.put_back()
        random.restore()
        foreign.restore()
        is_back = True

    try:
        try:
            with told_of_writes(state.to_copy, state.keep) if lazily else nullcontext():
                yield state, put_back
        finally:
            put_back()
    finally:
        if not is_back:  # Ctrl-C came in the middle
            put_back()
    lost = state.lost()
    if lost:
        raise ProfileError(
            f"{lost} was written to in a way that torch cannot see, from outside of torch or from "
            "another thread, so that it could not be put back; let the model's forward change "
            "nothing but buffers"
        )
