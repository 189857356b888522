"""The modules and trained tensors that a right-hand side reads besides its arguments."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from ...base.errors import WorkloadError
from ...tensors.weak import referent
from .references import Reference, walk


@final
@dataclass(frozen=True)
class Closure:
    """Everything with a gradient that a function was found to read."""

    modules: tuple[nn.Module, ...]
    """Modules: the function itself, or those that it calls."""
    references: tuple[Reference, ...]
    """Those to tensors that require a gradient and belong to no module."""
    generators: tuple[torch.Generator, ...] = ()
    """Random generators that belong to no module."""
    roots: tuple[Reference, ...] = ()
    """The references that `replaced` changes: those in `references`, of tuples the outer ones."""

    @property
    def parts(self) -> list[nn.Module]:
        """The modules, with all modules inside."""
        return [part for module in self.modules for part in module.modules()]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The distinct tensors behind the references, as they are now."""
        return tuple({id(p.get()): p.get() for p in self.references}.values())

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """All that gradients may be wanted for: the modules' parameters, then the tensors."""
        owned = (p for module in self.modules for p in module.parameters())
        found = {id(p): p for p in (*owned, *self.tensors)}
        return tuple(p for p in found.values() if p.requires_grad)

    def check_compiled(self) -> None:
        """Refuse a module of TorchScript, whose parameters and buffers cannot be replaced."""
        for module in self.parts:
            if is_scripted(module) and len((*module.parameters(), *module.buffers())):
                raise WorkloadError(
                    f"func reads a module of TorchScript ({type(module).__name__}"
                    f" {getattr(module, 'original_name', '')!r}), whose parameters and buffers "
                    "cannot be replaced while it runs again, so it cannot be solved within a "
                    "budget; give the module that was scripted or traced, torch.compile it "
                    "instead, or solve without a budget"
                )

    @contextmanager
    def replaced(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Let the function read other tensors meanwhile, one for each of `tensors`, if any."""
        if not tensors:
            yield
            return
        before = [reference.get() for reference in self.references]
        order = {id(t): k for k, t in enumerate({id(t): t for t in before}.values())}
        roots = [(root, root.get()) for root in self.roots]
        try:
            for reference, value in zip(self.references, before, strict=True):
                reference.put(tensors[order[id(value)]])
            yield
        finally:
            for root, value in roots:
                root.put(value)


def find_closure(func: Callable[..., Any]) -> Closure:
    """Find the modules and trained tensors that a function, method, module or partial reads.

    Looked at are cells, globals, defaults, attributes, lists and dicts. Of a module these are its
    parameters and, among its other attributes, tensors that are leaves: one with a graph may be
    left from a call before, and that graph be gone. Tensors hidden otherwise, in a C extension say,
    are not found; the backward refuses them, because their gradient would be lost
    (`unknown_leaves`).
    """
    modules: dict[int, nn.Module] = {}
    references: list[Reference] = []
    generators: list[torch.Generator] = []
    for holder in walk(func):
        if isinstance(holder.value, torch.Generator):
            generators.append(holder.value)
        elif isinstance(holder.value, nn.Module):
            modules[id(holder.value)] = holder.value
        for reference in holder.references:
            inner = reference.look()
            if isinstance(inner, Tensor) and inner.requires_grad:
                owned = holder.owned
                if owned is None or (inner.is_leaf and id(inner) not in owned):
                    references.append(reference)
    roots = {(id(r.container), r.key): r for r in (reference.root for reference in references)}
    return Closure(
        tuple(modules.values()), tuple(references), tuple(generators), tuple(roots.values())
    )


def is_scripted(module: nn.Module) -> bool:
    """Whether a module was made by `torch.jit.script` or `torch.jit.trace`."""
    return isinstance(module, getattr(torch.jit, "ScriptModule", ()))


def unknown_leaves(outputs: Iterable[Node | None], known: Iterable[Tensor]) -> list[Tensor]:
    """Leaves that a graph leads to; those in `known` are left out, and not followed."""
    known = list(known)
    stops = {id(t) for t in known}
    seen = {t.grad_fn for t in known if t.grad_fn is not None}
    found: dict[int, Tensor] = {}
    ahead = list(outputs)
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in stops:
            found[id(leaf)] = leaf
        ahead += [before for before, _ in node.next_functions]
    return list(found.values())


def outlive(leaves: list[Tensor]) -> list[Tensor]:
    """Those of some leaves that others hold, too: a function that makes leaves lets go of them.

    The list, with graphs that lead to them all that is known of them here, is emptied.
    """
    references = [weakref.ref(leaf) for leaf in leaves]
    leaves.clear()
    if any(reference() is not None for reference in references):
        gc.collect()  # it may be a circle that holds one
    return [leaf for leaf in map(referent, references) if leaf is not None]
