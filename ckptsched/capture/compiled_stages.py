"""The stages of a recorded model, compiled one by one.

The calls of a stage become a function that is given everything: the modules that are called, the
tensors that the model keeps, and those of the state. So stages that make the same calls, such as
the layers of a network, share what is compiled of it, whoever owns their parameters.
"""

from __future__ import annotations

import linecache
import os
import shutil
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from ..base.errors import ProfileError
from ..recompute.fsdp import has_hooks
from .recording.calls import PLAIN, Fixed, Numbered, RecordedCall, Source, StagePath
from .recording.complaints import Complaint
from .recording.functions import EFFECTS
from .recording.recording import Span
from .stage_discovery import StageCall
from .wrappers import is_compiled

_INDUCTOR = "inductor"
# Constants of a call that tell calls apart by their text.
_PLAIN_VALUES = (
    *(bool, int, float, complex, str, bytes, type(None), type(...), torch.Size),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)

_Function: TypeAlias = Callable[..., tuple[Tensor, ...]]


@final
@dataclass(frozen=True, slots=True)
class StageCode:
    """The calls of a stage as the source of a function."""

    text: str
    names: Mapping[str, Any]
    """The functions and constants that it names."""
    reads: tuple[Source, ...]
    """What tensors it is given, in order, after the modules."""
    makes: tuple[int, ...]
    """Numbers of the values that it gives."""

    @property
    def key(self) -> Hashable:
        """Equal for code that computes the same."""
        named = [v if callable(v) else (type(v), repr(v)) for v in self.names.values()]
        return self.text, tuple(named)

    def function(self) -> _Function:
        """The function, which is another one each time: torch keeps what it compiles by that."""
        names, file = dict(self.names), f"<stage {hash(self.text):x} of a recording>"
        # A function without source is wrapped by torch 2.9 in one that all of them would share, so
        # that each counted as compiled anew; and what goes wrong in a stage shows its lines.
        lines = self.text.splitlines(keepends=True)
        linecache.cache[file] = len(self.text), None, lines, file
        exec(compile(self.text, file, "exec"), names)
        found: _Function = names["stage"]
        return found


@final
class Compiler:
    """Compiles stages, each kind of stage once."""

    def __init__(self, backend: str) -> None:
        """Compile by a backend of torch.compile.

        Args:
            backend: Its name.

        Raises:
            ProfileError: There is no such backend, or no compiler of C++, which it needs.
        """
        self.backend = backend
        known = torch.compiler.list_backends(())
        if backend not in known:
            raise ProfileError(
                f"compile is {backend!r}; give True, False or one of torch's backends: "
                f"{', '.join(known)}"
            )
        if backend == _INDUCTOR and not _finds_compiler():
            raise ProfileError(
                "compile=True needs a compiler of C++, as torch.compile does, and none was found "
                "as $CXX or g++: install one, or leave compile=True out"
            )
        self._made: dict[Hashable, _Function] = {}
        self._refused: dict[Hashable, str] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Compiled code is made again."""
        return Compiler, (self.backend,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Compiler:
        """Itself: nothing in it belongs to one model."""
        return self

    @property
    def count(self) -> int:
        """How many functions have been compiled."""
        return len(self._made)

    @property
    def refused(self) -> tuple[str, ...]:
        """Why stages run as they are that torch could not compile."""
        return tuple(self._refused.values())

    def run(
        self, code: StageCode, modules: Sequence[nn.Module], tensors: Sequence[Tensor]
    ) -> tuple[Tensor, ...] | None:
        """Run the code of a stage.

        Args:
            code: The code.
            modules: The modules that it calls, in order.
            tensors: The tensors that it reads, in order.

        Returns:
            The tensors that it makes; None where torch cannot compile it.

        Raises:
            ProfileError: The compiler fails.
        """
        # Sizes are part of the key: compiled for all sizes at once it would be slower.
        layouts = tuple([(t.shape, t.dtype, t.device, t.stride()) for t in tensors])
        settings = tuple([(repr(module), module.training) for module in modules])
        # Torch would compile anew for the other grad mode, and gives up after a few times.
        key = code.key, layouts, settings, torch.is_grad_enabled()
        if key in self._refused:
            return None
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = self._compiled(code)
        try:
            # Not the first call alone: torch may have been told to compile nothing at that time.
            return made(*modules, *tensors)
        except torch._dynamo.exc.Unsupported as error:  # nothing has run yet
            self._refused[key] = str(error).partition("\n")[0]
            del self._made[key]
            return None
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ProfileError(
                f"torch.compile, by {self.backend!r}, fails on a stage: {error}"
            ) from error

    def _compiled(self, code: StageCode) -> _Function:
        found: _Function = torch.compile(
            code.function(),
            backend=self.backend,
            # Eager's own random numbers: a step draws what it draws without the compiler.
            options={"fallback_random": True} if self.backend == _INDUCTOR else None,
            fullgraph=True,
            dynamic=False,
        )
        return found


@final
class CompiledStage(StageCall):
    """A stage of a recording, compiled."""

    __slots__ = ("_code", "_compiler", "_modules", "_plain", "_span", "module")

    module: nn.Module

    def __init__(
        self,
        plain: StageCall,
        span: Span,
        code: StageCode,
        compiler: Compiler,
        modules: Sequence[nn.Module],
    ) -> None:
        """Compile a stage.

        Args:
            plain: The stage as it is, which runs where torch cannot compile it.
            span: Its calls.
            code: The same as code.
            compiler: What compiles it.
            modules: The modules that they call, in order.
        """
        self.prefix, self.module = plain.prefix, plain.module
        self._plain, self._span, self._code = plain, span, code
        self._compiler, self._modules = compiler, tuple(modules)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Make the calls, of the values that are alive before; give those alive after."""
        values = dict(zip(self._span.enters, x, strict=True))
        tensors = [self._span.bound.tensor(source, values) for source in self._code.reads]
        made = self._compiler.run(self._code, self._modules, tensors)
        del tensors
        if made is None:
            del values
            return self._plain(x)
        # A value that a call changes in place and gives back keeps its number.
        values.update(zip(self._code.makes, made, strict=True))
        return tuple([values[number] for number in self._span.leaves])

    @property
    def once(self) -> bool:
        """Whether the stage as it is is to run once."""
        return self._plain.once

    @property
    def label(self) -> str:
        """That of the stage as it is."""
        return self._plain.label

    @property
    def key(self) -> Hashable:
        """That of the stage as it is, and of its own."""
        return ("compiled", self._compiler.backend, self._plain.key)


def code_of(
    calls: Sequence[RecordedCall], modules: Sequence[nn.Module], leaves: Sequence[int]
) -> StageCode | str:
    """Write the calls of a stage as a function.

    Args:
        calls: The calls.
        modules: The modules that they call, in order.
        leaves: Numbers of the values that are needed after them.

    Returns:
        The code; a text that says why there is none.
    """
    for call in calls:
        why = _why_not(call)
        if why:
            return f"{call.name} {why}"
    for module in modules:
        of_torch = type(module).__module__.startswith("torch.nn.modules")
        if not of_torch or has_hooks(module) or is_compiled(module):
            return f"{type(module).__name__} is no plain module of torch.nn"
    return _Writer(calls, leaves).code()


@final
class _Writer:
    """Writes the source of a stage."""

    def __init__(self, calls: Sequence[RecordedCall], leaves: Sequence[int]) -> None:
        self._calls, self._leaves = calls, leaves
        self._names: dict[str, Any] = {"flat": _flat, "Tensor": Tensor}
        self._reads: dict[object, Source] = {}
        self._values: dict[object, str] = {}

    def code(self) -> StageCode:
        """The code of all calls."""
        lines, count = [], 0
        made: dict[int, None] = {}
        for call in self._calls:
            given = [self._read(source) for source in call.reads]
            if isinstance(call.target, str):
                text, count = self._call(f"module_{count}", call, given), count + 1
            else:
                text = self._function(call.target, call, given)
            names = [self._make(number) for number in call.makes]
            made.update((n, None) for n in (*call.makes, *call.writes) if n >= 0)
            lines.append(f"{', '.join(names)}, = flat({text})" if names else text)
        makes = tuple([n for n in self._leaves if n in made])
        result = "".join(f"{self._values[Numbered(n)]}, " for n in makes)
        head = [*(f"module_{k}" for k in range(count)), *(f"t{k}" for k in range(len(self._reads)))]
        body = "\n    ".join([*lines, f"return ({result})"])
        text = f"def stage({', '.join(head)}):\n    {body}\n"
        return StageCode(text, self._names, tuple(self._reads.values()), makes)

    def _read(self, source: Source) -> str:
        key: object = ("fixed", id(source.tensor)) if isinstance(source, Fixed) else source
        if key not in self._values:
            self._values[key] = f"t{len(self._reads)}"
            self._reads[key] = source
        return self._values[key]

    def _make(self, number: int) -> str:
        if number < 0:  # in a place of the model's
            return "_"
        return self._values.setdefault(Numbered(number), f"v{len(self._values)}")

    def _function(self, target: Any, call: RecordedCall, given: Sequence[str]) -> str:
        name = getattr(target, "__name__", "")
        of = getattr(target, "__self__", None)
        if name == "__get__" and len(given) == 1:
            return f"{given[0]}.{getattr(of, '__name__', '')}"
        if getattr(Tensor, name, None) is target:
            return self._call(f"Tensor.{name}", call, given)
        return self._call(self._named(target), call, given)

    def _call(self, callee: str, call: RecordedCall, given: Sequence[str]) -> str:
        names = [_Name(text) for text in given]
        args, kwargs = call.given.replaced(names).value()  # type: ignore[arg-type]
        parts = [self._text(arg) for arg in args]
        parts += [f"{name}={self._text(value)}" for name, value in kwargs.items()]
        return f"{callee}({', '.join(parts)})"

    def _text(self, value: Any) -> str:
        if isinstance(value, _Name):
            return value.text
        if type(value) is tuple:
            return f"({''.join(f'{self._text(part)}, ' for part in value)})"
        if type(value) is list:
            return f"[{', '.join(self._text(part) for part in value)}]"
        if type(value) is dict:
            pairs = [f"{key!r}: {self._text(part)}" for key, part in value.items()]
            return f"{{{', '.join(pairs)}}}"
        if type(value) is slice:
            parts = (value.start, value.stop, value.step)
            return f"slice({', '.join(self._text(part) for part in parts)})"
        return self._named(value)

    def _named(self, value: Any) -> str:
        name = f"c{len(self._names)}"
        self._names[name] = value
        return name


@final
@dataclass(frozen=True, slots=True)
class _Name:
    """Stands for a tensor in the arguments of a call."""

    text: str


def _why_not(call: RecordedCall) -> str:
    """Why a call is left as it is; empty where it can be compiled."""
    if call.around != PLAIN:
        return "runs without gradients, or among another autocast"
    if call.why_whole or call.target == "":
        return "is called whole"
    if isinstance(call.target, StagePath):
        return "is a stage of a module that lists its own"
    if isinstance(call.target, type):
        return "is a custom autograd Function"
    if isinstance(call.target, Complaint):
        return "reads values"
    if call.target in EFFECTS or getattr(call.target, "__name__", "") == "__set__":
        return "changes a tensor's properties"
    stands = [_Name("")] * len(call.reads)
    strange = next(_strange(call.given.replaced(stands).value()), None)  # type: ignore[arg-type]
    return "" if strange is None else f"is given a {type(strange).__name__}"


def _strange(value: Any) -> Iterator[Any]:
    """The parts of an argument whose text does not tell what they are."""
    if type(value) in (tuple, list):
        for part in value:
            yield from _strange(part)
    elif type(value) is dict:
        for key, part in value.items():
            yield from _strange(part)
            yield from _strange(key)
    elif type(value) is slice:
        yield from _strange((value.start, value.stop, value.step))
    elif type(value) not in _PLAIN_VALUES and not isinstance(value, _Name):
        yield value


def _flat(result: Any) -> tuple[Tensor, ...]:
    """The distinct tensors of a result, in order, as `tensors_of` finds them; compilers read it."""
    if isinstance(result, Tensor):
        return (result,)
    found: list[Tensor] = []
    parts = result.values() if isinstance(result, dict) else result
    for part in parts if isinstance(parts, (tuple, list)) or isinstance(result, dict) else ():
        for tensor in _flat(part):
            if not any(tensor is other for other in found):
                found.append(tensor)
    return tuple(found)


def _finds_compiler() -> bool:
    """Whether torch's inductor finds a compiler of C++."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError:  # a private place
        return shutil.which(os.environ.get("CXX") or "g++") is not None
    try:
        get_cpp_compiler()
    except RuntimeError:
        return False
    return True
