"""What operators compute and move, and the seconds that follow from a device's rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Names that autograd's formulas give an attention whose operations are those of another.
_SAME_WORK = {
    "_scaled_dot_product_flash_attention_for_cpu": "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        "_scaled_dot_product_flash_attention_backward"
    ),
}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How fast a device is."""

    flops_per_second: float
    """Operations of floating point a second, of dtypes that `by_dtype` does not name."""
    bytes_per_second: float
    """Bytes that it moves between memory and its units a second."""
    by_dtype: Mapping[str, float] = field(default_factory=dict)
    """Operations a second by dtype, such as "bfloat16"."""

    def seconds(self, flops: int, moved_bytes: int, dtype: torch.dtype) -> float:
        """Seconds of an operator.

        Args:
            flops: Its operations of floating point.
            moved_bytes: What it reads and writes.
            dtype: Of what it gives.
        """
        rate = self.by_dtype.get(str(dtype).removeprefix("torch."), self.flops_per_second)
        return flops / rate + moved_bytes / self.bytes_per_second


# Only ratios matter to a plan: which stages are dear, and how dear. 10 operations a byte lies
# between CPUs and GPUs, so that convolutions count by their arithmetic, activations by memory.
NOMINAL = Rates(flops_per_second=1e11, bytes_per_second=1e10)


@final
class Work(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what operators take, in the thread that it is entered in."""

    def __init__(self, rates: Rates) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rates = rates
        self.flops = 0
        """Operations of floating point."""
        self.seconds = 0.0
        """By the rates, one operator after the other."""
        self.draws = False
        """Whether one may draw random numbers."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Have torch not import its compiler for this mode, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        self.draws = self.draws or draws(func, args)
        results = list(_tensors(made))
        if func.is_view or not results:
            return made
        flops = _flops(func, args, kwargs, made)
        moved = {t.untyped_storage()._cdata: t for t in _tensors((args, kwargs, made))}
        size = sum(tensor.numel() * tensor.element_size() for tensor in moved.values())
        self.flops += flops
        self.seconds += self.rates.seconds(flops, size, results[0].dtype)
        return made


def draws(func: Any, args: Any) -> bool:
    """Whether an operator draws random numbers.

    Args:
        func: The operator.
        args: What it is given by position.
    """
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    name = func._schema.name
    if "attention" not in name:
        return True
    # Kernels of attention draw where there is dropout; its place differs from one to the other.
    return any(isinstance(value, float) and 0 < value < 1 for value in args)


def _flops(func: Any, args: Any, kwargs: Any, made: Any) -> int:
    from torch.utils.flop_counter import flop_registry  # when it is needed: it takes a while

    packet = func._overloadpacket
    formula = flop_registry.get(packet)
    if formula is None:
        name = _SAME_WORK.get(packet.__name__)
        formula = name and flop_registry.get(getattr(torch.ops.aten, name))
    return int(formula(*args, **kwargs, out_val=made)) if formula else 0


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.layout is torch.strided:
            yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
