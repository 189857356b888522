"""Lean tapes: what cheap operations made is not kept for the backward, and made again in it.

Autograd keeps what each operation of a stage needs for its backward. Of a norm, an activation and
a product, the product keeps the activation's output, which takes as many bytes as the norm's
input and far fewer seconds to make again than the product. A lean tape keeps what dear calls made
and of the rest as little as it can: the kept storages are a least cut between what only dear
calls can make and what the backward needs. The rest is made again at once when the backward first
asks for some of it, from the very values that the forward computed with, and so to the same bits.

The idea is that of selective checkpointing and of memory-efficient DenseNets (Pleiss et al.,
2017, arXiv 1707.06990); that a least cut decides is known from the partitioner of torch's
compiler.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..base.errors import ExecutionError

Remake = Callable[[Sequence[int], Sequence[Sequence[int]], dict[int, Tensor]], None]
"""Makes some calls again, by index in the stage, and puts what they make among the values; after
each it takes some values out, by number."""


@final
@dataclass(frozen=True, slots=True)
class Call:
    """A call of a stage, as far as lean tapes go by it. Values have numbers."""

    reads: tuple[int, ...]
    """The values that it reads."""
    makes: tuple[int, ...]
    """Those that it makes; negative for what lies elsewhere."""
    writes: tuple[int, ...]
    """Those that it changes in place."""
    cheap: bool
    """Whether it may be made again in the backward."""


class Slot(list[Tensor]):
    """What a node of the graph keeps in the place of a tensor: that, or how to make it again.

    A list of one tensor or none, so that a walk of the graph sees what is kept.
    """

    __slots__ = ("__weakref__", "dtype", "home", "layout", "version")

    def __init__(self, tensor: Tensor) -> None:
        """Keep a tensor for now; its `home` is -1, a storage that no call of the stage has made."""
        super().__init__((tensor,))
        self.home, self.version = -1, tensor._version

    def lies_in(self, home: int) -> None:
        """Note where in which storage the tensor lies, by the storage's number."""
        (tensor,) = self
        self.home, self.dtype = home, tensor.dtype
        self.layout = (tensor.storage_offset(), tensor.size(), tensor.stride())


class Chosen(NamedTuple):
    """What a lean tape keeps and what it makes again."""

    remade: Mapping[int, int]
    """Storages that are needed and made again, by number, and a value that lies in each."""
    roots: tuple[int, ...]
    """Values that are kept to make them of."""
    calls: tuple[int, ...]
    """The calls to make, in order, by index."""
    spent: tuple[tuple[int, ...], ...]
    """For each of them the values that nothing needs after it."""


@final
class LeanTape:
    """Follows one run of a stage, and hands its backward what that needs."""

    def __init__(self, calls: Sequence[Call], remake: Remake) -> None:
        """Begin before the first call.

        Args:
            calls: Those of the stage.
            remake: Makes calls again, as they were made.
        """
        self._calls, self._remake = tuple(calls), remake
        self._read_by_cheap = {n for call in calls if call.cheap for n in call.reads}
        self._home_of: dict[int, int] = {}  # the storage of each value, by number
        self._known: dict[int, int] = {}  # of storages that are there: torch's name, our number
        self._sizes: list[int] = []
        self._held: dict[int, Tensor] = {}
        self._slots: list[weakref.ref[Slot]] = []
        self._unknown: dict[int, list[Slot]] = {}  # of the call that runs, by torch's name
        self._chosen = Chosen({}, (), (), ())
        self._remade: dict[int, Tensor] = {}
        self._left: dict[int, int] = {}  # how many slots of each storage are still to be asked

    def saving(self) -> saved_tensors_hooks:
        """A context around the calls, in which the tape decides what is kept of each tensor."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def note(self, values: Mapping[int, Tensor], numbers: Iterable[int]) -> None:
        """Note values that have come to be there, and forget storages that are there no longer.

        Args:
            values: All that are there, by number.
            numbers: The new ones.
        """
        for number in numbers:
            tensor = values.get(number) if number >= 0 else None
            if tensor is None:
                continue
            name = _storage_of(tensor)
            if name is None:
                continue
            home = self._known.setdefault(name, len(self._sizes))
            if home == len(self._sizes):
                self._sizes.append(tensor.untyped_storage().nbytes())
                for slot in self._unknown.get(name, ()):  # an operation keeps what it makes itself
                    slot.lies_in(home)
            self._home_of[number] = home
            if number in self._read_by_cheap:
                self._held[number] = tensor.detach()
        self._unknown.clear()

    def forget_all_but(self, values: Mapping[int, Tensor]) -> None:
        """Give the names of storages free that nothing here holds any longer.

        Args:
            values: The values that are there.
        """
        there = {self._home_of[n] for n in (*values, *self._held) if n in self._home_of}
        if len(there) < len(self._known):
            self._known = {name: home for name, home in self._known.items() if home in there}

    def settle(self, inputs: Iterable[int], outputs: Iterable[int]) -> tuple[int, ...]:
        """Decide, after the last call, what is kept, and let the rest go.

        Args:
            inputs: Numbers of the values of the state before.
            outputs: Numbers of those of the state after.

        Returns:
            The calls that a backward will make again, in order, by index.
        """
        found = [slot for slot in (ref() for ref in self._slots) if slot is not None]
        needed = frozenset(slot.home for slot in found if slot.home >= 0)
        there = frozenset(self._home_of[n] for n in (*inputs, *outputs) if n in self._home_of)
        homes = tuple(sorted(self._home_of.items()))
        self._chosen = choose(self._calls, homes, tuple(self._sizes), there, needed)
        for slot in found:
            if slot.home in self._chosen.remade:
                slot.clear()
                self._left[slot.home] = self._left.get(slot.home, 0) + 1
        self._held = {n: self._held[n] for n in self._chosen.roots}
        self._slots.clear()
        self._known.clear()
        return self._chosen.calls

    def _pack(self, tensor: Tensor) -> Slot | Tensor:
        name = _storage_of(tensor)
        slot = Slot(tensor.detach())
        if name is not None and not tensor.is_conj() and not tensor.is_neg():
            if name in self._known:
                slot.lies_in(self._known[name])
            else:
                self._unknown.setdefault(name, []).append(slot)
        self._slots.append(weakref.ref(slot))
        return slot

    def _unpack(self, slot: Slot) -> Tensor:
        if slot:
            (tensor,) = slot
            if tensor._version != slot.version:
                raise ExecutionError(
                    "a tensor that a stage keeps for its backward was changed in place since it "
                    f"was made (shape {tuple(tensor.shape)}, {tensor.dtype}); change a copy instead"
                )
            return tensor
        if slot.home not in self._remade:
            self._make_again()
        made = self._remade[slot.home]
        self._left[slot.home] -= 1
        if not self._left[slot.home]:
            del self._remade[slot.home]
        # The tensor may be another view of the storage, of another dtype, too.
        empty = torch.empty(0, dtype=slot.dtype, device=made.device)
        return empty.set_(made.untyped_storage(), *slot.layout)

    def _make_again(self) -> None:
        if not self._held and self._chosen.roots:
            raise ExecutionError("the backward of a stage with a lean tape was run a second time")
        values, self._held = self._held, {}
        self._remake(self._chosen.calls, self._chosen.spent, values)
        for home, number in self._chosen.remade.items():
            found = values[number].untyped_storage().nbytes()
            if found != self._sizes[home]:
                raise ExecutionError(
                    f"a tensor of {self._sizes[home]} bytes that a stage makes again for its "
                    f"backward takes {found} now"
                )
            self._remade[home] = values[number]


def _storage_of(tensor: Tensor) -> int | None:
    """What torch calls the storage of an ordinary tensor; None for another."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return None
    name: int = tensor.untyped_storage()._cdata
    return name


@functools.lru_cache(maxsize=1024)
def choose(
    calls: tuple[Call, ...],
    homes: tuple[tuple[int, int], ...],
    sizes: tuple[int, ...],
    there: frozenset[int],
    needed: frozenset[int],
) -> Chosen:
    """Which storages a lean tape makes again: those that a least cut leaves out.

    Args:
        calls: Those of the stage, in order.
        homes: Pairs of a value's number and its storage's.
        sizes: Bytes of each storage.
        there: Storages that are there in any case: of the states before and after.
        needed: Those that the backward needs.

    Returns:
        What is made again, and how; nothing where that would save no bytes.
    """
    home_of = dict(homes)
    makers = _makers(calls, home_of, there)
    needs = {
        home: {home_of[n] for k in made for n in calls[k].reads if n in home_of} - {home}
        for home, made in makers.items()
    }
    kept = _least_cut(needs, sizes, there, needed)
    remade = frozenset(needed - kept - there)
    if not remade <= needs.keys():
        raise AssertionError("a storage is neither kept nor can be made again")
    chosen: set[int] = set()
    roots: set[int] = set()
    maker_of = _first_makers(calls)
    ahead = [n for home in remade for n in calls[makers[home][0]].makes if home_of.get(n) == home]
    seen = set(ahead)
    while ahead:
        number = ahead.pop()
        home = home_of[number]
        if home in kept or home in there:
            roots.add(number)
            continue
        for k in {maker_of[number], *makers[home]} - chosen:
            chosen.add(k)
            fresh = [n for n in calls[k].reads if n in home_of and n not in seen]
            seen.update(fresh)
            ahead += fresh
    program = tuple(sorted(chosen))
    wanted: dict[int, int] = {}
    last: dict[int, int] = {}
    for k in program:
        for n in calls[k].makes:
            if home_of.get(n) in remade:
                wanted.setdefault(home_of[n], n)
        last.update(dict.fromkeys((*calls[k].reads, *calls[k].makes), k))
    for n in wanted.values():
        last.pop(n)
    spent = tuple([tuple([n for n, at in last.items() if at == k]) for k in program])
    return Chosen(wanted, tuple(sorted(roots)), program, spent)


def _makers(
    calls: Sequence[Call], home_of: Mapping[int, int], there: frozenset[int]
) -> dict[int, list[int]]:
    """For each storage that can be made again the calls that make it and write to it."""
    written: dict[int, list[int]] = {}
    for k, call in enumerate(calls):
        for n in call.writes:
            if n in home_of:
                written.setdefault(home_of[n], []).append(k)
    made_by: dict[int, int] = {}
    value_by = _first_makers(calls)
    for n, k in value_by.items():
        home = home_of.get(n)
        if home is not None:
            made_by[home] = min(made_by.get(home, k), k)
    again = [call.cheap and _writes_alone(call, home_of) for call in calls]
    found: dict[int, list[int]] = {}
    # Until nothing changes: a storage hangs on all of its calls, and a call on what it reads.
    while True:
        found = {
            home: sorted({k, *written.get(home, ())})
            for home, k in made_by.items()
            if home not in there and again[k] and all(again[j] for j in written.get(home, ()))
        }
        before = list(again)
        for k, call in enumerate(calls):
            again[k] = again[k] and all(
                _is_to_be_had(n, k, call, home_of, written, found, value_by, again)
                for n in call.reads
            )
        if again == before:
            return found


def _first_makers(calls: Sequence[Call]) -> dict[int, int]:
    """For each value the call that makes it; calls that change it give it back."""
    found: dict[int, int] = {}
    for k, call in enumerate(calls):
        for n in call.makes:
            if n >= 0:
                found.setdefault(n, k)
    return found


def _writes_alone(call: Call, home_of: Mapping[int, int]) -> bool:
    """Whether a call makes nothing new beside what it changes in place, if it changes anything."""
    written = {home_of.get(n) for n in call.writes}
    return not written or {home_of.get(n) for n in call.makes} <= written


def _is_to_be_had(
    n: int,
    k: int,
    call: Call,
    home_of: Mapping[int, int],
    written: Mapping[int, list[int]],
    found: Mapping[int, list[int]],
    value_by: Mapping[int, int],
    again: Sequence[bool],
) -> bool:
    """Whether a call made again would read a value as it was, kept or made again."""
    home = home_of.get(n)
    if home is None:  # no ordinary tensor
        return False
    if home in found:
        # In the middle of its being written it is made anew only if it is not kept meanwhile.
        writes = home in {home_of.get(w) for w in call.writes}
        return (writes or k > max(written.get(home, [-1]))) and again[value_by.get(n, k)]
    return k > max(written.get(home, [-1]))


def _least_cut(
    needs: Mapping[int, set[int]],
    sizes: Sequence[int],
    there: frozenset[int],
    needed: frozenset[int],
) -> frozenset[int]:
    """The storages to keep: the fewest bytes from which all that is needed can be made.

    Of cuts of as many bytes it is the one that makes least again.

    Args:
        needs: For each storage that can be made again those that it is made of.
        sizes: Bytes of each storage.
        there: Storages that are there in any case.
        needed: Those that are needed.
    """
    import networkx

    graph = networkx.DiGraph()
    for home, size in enumerate(sizes):
        # Of equal bytes rather one storage than two.
        graph.add_edge((home, "in"), (home, "out"), capacity=0 if home in there else size + 1)
        if home not in needs:
            graph.add_edge("dear", (home, "in"))
        for source in needs.get(home, ()):
            graph.add_edge((source, "out"), (home, "in"))
        if home in needed:
            graph.add_edge((home, "out"), "needed")
    if "needed" not in graph or "dear" not in graph:
        return needed
    # Seen from the end, so that what is kept lies as near to it as may be.
    _, (near, _) = networkx.minimum_cut(graph.reverse(copy=False), "needed", "dear")
    return frozenset(
        home for home in range(len(sizes)) if (home, "out") in near and (home, "in") not in near
    )
