"""The calls of a stage, written as one function of Python.

A stage of a recording is often a few calls of small kernels, and runs many times a step. Going
through a list of calls, with their values in a dictionary and their arguments put together each
time, takes as long as such a kernel. Written out, a call takes what it takes in a model's forward:
values are local variables, deleted after their last use, and parameters are looked up where the
model keeps them.
"""

from __future__ import annotations

import functools
import keyword
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any, TypeAlias, final

from torch import Tensor

from ....base.errors import ExecutionError
from ....tensors.pytree import _Branch, _Constant, _Leaf, _Node
from ..calls import PLAIN, Numbered, Place, RecordedCall, Source, tensors_of
from ..recording import Bound, Span

Run: TypeAlias = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
"""Takes the values that are alive before a stage, and gives those that are alive after it."""

_LITERALS = (bool, int, str, type(None))


@final
class Written:
    """The function of a stage, once it is written; copies of the stage write their own."""

    __slots__ = ("run",)

    def __init__(self) -> None:
        """Nothing yet."""
        self.run: Run | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """What is written names the parts of one model."""
        return Written, ()


def write(span: Span) -> Run:
    """Write the calls of a stage as a function.

    Args:
        span: The calls.
    """
    return _Writer(span.bound).function(span)


@functools.lru_cache(maxsize=1024)  # equal layers of a network have equal text
def _compiled(text: str) -> CodeType:
    return compile(text, "<stage of a recording>", "exec")


@final
class _Writer:
    """Writes the source of one stage."""

    def __init__(self, bound: Bound) -> None:
        self._bound = bound
        self._names: dict[str, Any] = {"Tensor": Tensor}
        self._name_of: dict[int, str] = {}
        self._values: dict[int, str] = {}

    def function(self, span: Span) -> Run:
        lines = [f"{self._tuple([self._value(n) for n in span.enters])} = x", "del x"]
        for k, call, gone in zip(span.indices, span.calls, span.spent, strict=True):
            lines += self._call(k, call)
            names = [self._values[n] for n in gone if n in self._values]
            lines += [f"del {', '.join(names)}"] if names else []
        lines.append(f"return {self._tuple([self._values[n] for n in span.leaves])}")
        body = "\n    ".join(lines)
        exec(_compiled(f"def stage(x):\n    {body}\n"), self._names)
        found: Run = self._names.pop("stage")
        return found

    def _call(self, k: int, call: RecordedCall) -> list[str]:
        given = [self._source(source) for source in call.reads]
        if call.why_whole:  # with what is around such a call
            whole = self._named(functools.partial(_called_whole, self._bound, k, call))
            values = [self._values[n] for n in call.values]
            return self._taken(call, f"{whole}({', '.join(values)})")
        tree = call.given.tree
        assert isinstance(tree, _Branch)
        args, kwargs = tree.parts
        assert isinstance(args, _Branch)
        assert isinstance(kwargs, _Branch)
        parts = [self._text(part, given) for part in args.parts]
        for name, part in zip(kwargs.keys, kwargs.parts, strict=True):
            text = self._text(part, given)
            plain = name.isidentifier() and not keyword.iskeyword(name)
            parts.append(f"{name}={text}" if plain else f"**{{{name!r}: {text}}}")
        lines = self._taken(call, f"{self._named(self._bound.callee(k))}({', '.join(parts)})")
        if call.around is PLAIN:
            return lines
        return [f"with {self._named(call.around.entered)}():", *(f"    {line}" for line in lines)]

    def _taken(self, call: RecordedCall, text: str) -> list[str]:
        """What a call gives, put into variables."""
        names = [self._value(n) if n >= 0 else "_" for n in call.makes]
        flat = self._named(functools.partial(_flat, call))
        if len(names) == 1:
            (name,) = names
            lines = [f"{name} = {text}", f"if type({name}) is not Tensor: {name}, = {flat}({name})"]
        else:
            lines = [f"{self._tuple(names)} = {flat}({text})"]
        return [*lines, "del _"] if "_" in names else lines

    def _value(self, number: int) -> str:
        return self._values.setdefault(number, f"v{len(self._values)}")

    def _source(self, source: Source) -> str:
        if isinstance(source, Numbered):
            return self._values[source.number]
        if not isinstance(source, Place):
            return self._named(source.tensor)
        owner = self._named(self._bound.owner(source))
        if source.steps:
            return f"{self._named(source.look_up)}({owner})"
        return f"{owner}.{source.kind or '__dict__'}[{source.name!r}]"

    def _text(self, node: _Node, given: Sequence[str]) -> str:
        """An argument: a tensor, a constant, or a container, which is made anew each time."""
        if isinstance(node, _Leaf):
            return given[node.index]
        if isinstance(node, _Constant):
            literal = type(node.value) in _LITERALS
            return repr(node.value) if literal else self._named(node.value)
        assert isinstance(node, _Branch)
        parts = [self._text(part, given) for part in node.parts]
        if node.build is tuple:
            return self._tuple(parts)
        listed = f"[{', '.join(parts)}]"
        return listed if node.build is list else f"{self._named(node.build)}({listed})"

    @staticmethod
    def _tuple(parts: Sequence[str]) -> str:
        return f"({''.join(f'{part}, ' for part in parts)})"

    def _named(self, value: Any) -> str:
        name = self._name_of.get(id(value))
        if name is None:
            name = self._name_of[id(value)] = f"c{len(self._name_of)}"
            self._names[name] = value
        return name


def _flat(call: RecordedCall, result: Any) -> tuple[Tensor, ...]:
    """The tensors of what a call gives.

    Raises:
        ExecutionError: It gives another number of them than when it was recorded.
    """
    made = tensors_of(result)
    if len(made) != len(call.makes):
        raise ExecutionError(
            f"{call.name} gave {len(made)} tensors, and {len(call.makes)} when the model was "
            "recorded; record it again"
        )
    return made


def _called_whole(bound: Bound, k: int, call: RecordedCall, *given: Tensor) -> tuple[Tensor, ...]:
    values = dict(zip(call.values, given, strict=True))
    bound.run(k, values)
    return tuple([values[number] for number in call.makes])
