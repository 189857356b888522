"""`will_it_fit()`: the question before a machine is rented, answered from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Unpack, final

import torch
from torch import Tensor, nn

from ...base.budget import DEVICE_SHARE, format_bytes, parse_budget
from ...base.errors import CkptschedError, InfeasibleBudgetError, ProfileError, WorkloadError
from ...capture.inspection import Inspection, inspect_model
from ...planner.plan import Plan
from ...planner.planner import PlanOptions, plan_each, plan_one
from ...profiler.profile import estimated
from ...profiler.stage_kind import Loss
from ...profiler.without_data.work import NOMINAL, Rates
from ...tensors.pytree import State
from ...workload.chain import Chain
from ..largest_that_fits import Fit, search_sizes
from .devices import DeviceFigures, find_device
from .forecast import Forecast
from .training_state import Sharing, kept_bytes, sharded

_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp64": torch.float64,
    "float64": torch.float64,
}
_SIZES = {"batch": 0, "sequence": 1}  # which dimension of the inputs
_PARTS = 16
_MOST = 2**20


def will_it_fit(
    model: nn.Module,
    *sample: Any,
    kwargs: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    device: str | DeviceFigures | None = None,
    device_memory: int | str | None = None,
    optimizer: str = "adamw",
    dtype: str | torch.dtype | None = None,
    master_weights: bool = False,
    devices: int = 1,
    shard: str = "none",
    largest: Iterable[str] = (),
    capture: bool | None = None,
    **options: Unpack[PlanOptions],
) -> Forecast:
    """Tell whether a training will fit a device, from shapes alone: nothing runs, no GPU is needed.

    A copy of the model runs on PyTorch's meta device, see `profile(fake=True)`; the model may lie
    there itself, so that it takes no memory however large it is.

    Args:
        model: Any module; it is left as it was.
        sample: What it is called with: one batch of one device, also on the meta device. Masks and
            positions that the model looks at need data.
        kwargs: The same by name.
        loss: From the output to a scalar, see `profile`.
        device: A name, such as "H100" (`DeviceFigures` for others): its memory, its kernels, and
            seconds; None for the kernels of the sample's device (a meta sample stands for CUDA)
            and no seconds.
        device_memory: What may be used of it, such as "76GiB" or bytes; None for 90 % of it: the
            rest is a margin for what is not counted.
        optimizer: "none", "sgd", "sgd-momentum", "adagrad", "rmsprop", "adam", "adamw" or
            "adamw8bit".
        dtype: What model and inputs are turned to, such as "bf16"; None for what they are.
        master_weights: Whether the optimizer keeps parameters and its state in float32.
        devices: How many devices share the work, each with a batch like the sample.
        shard: What is parted between them: "none", "optimizer", "grads" (those as well) or "full"
            (parameters as well).
        largest: "batch", "sequence" or both: the largest first and second length of the inputs
            with which a plan fits. Each takes several estimates, of the answer and the next size
            among them.
        capture: Whether to record the model, see `profile`.
        options: Of `plan`: solver, time_limit, cache.

    Raises:
        WorkloadError: A device, an optimizer, a dtype, a way to shard or a size that is not known;
            or neither a device nor its memory.
        BudgetSyntaxError: Memory that cannot be read.
        ProfileError: The model cannot be estimated; see `profile`.
    """
    figures = None if device is None else find_device(device)
    memory = _memory(figures, device_memory)
    sizes = _sizes_asked(largest)
    inspection = inspect_model(model, "will_it_fit", WorkloadError)
    call = State.of((sample, dict(kwargs or {})), opaque=True)
    question = _Question(
        inspection=inspection,
        loss=loss,
        kernels=_kernels(figures, call),
        dtype=_dtype(dtype),
        rates=_rates(figures),
        sharing=Sharing(devices=devices, shard=shard),
        capture=capture,
        options=options,
        memory_bytes=memory,
    )
    kept = kept_bytes(model, question.dtype, optimizer, master_weights, question.sharing)
    beside = sum(kept.values())
    for size in sizes:
        _length(call, size)  # before anything takes long
    chain, whole = question.chain(call)
    kept["batch"] = _bytes_of(call, question.dtype)
    everything = plan_one(chain, "100%", **options)
    found = question.plan(chain, sum(kept.values()))
    optimizer += " with master weights" if master_weights else ""
    return Forecast(
        model=type(model).__name__,
        device=figures.name if figures else "",
        memory_bytes=memory,
        setting=f"{optimizer}, {_shown(question.dtype)}, devices: {devices}, shard: {shard}",
        kept_bytes=kept,
        store_all=everything,
        plan=found if isinstance(found, Plan) else None,
        least_bytes=sum(kept.values()) + everything.least_budget_bytes,
        timed=figures is not None,
        whole=whole,
        largest={size: question.largest(call, size, beside, everything) for size in sizes},
    )


@final
@dataclass(frozen=True, kw_only=True)
class _Question:
    """What is asked of every size of the inputs."""

    inspection: Inspection
    loss: Loss | None
    kernels: torch.device
    dtype: torch.dtype | None
    rates: Rates
    sharing: Sharing
    capture: bool | None
    options: PlanOptions
    memory_bytes: int

    def chain(self, call: State) -> tuple[Chain, str]:
        """The estimate of a step on one device, and what of the model is whole in it, and why."""
        sample, kwargs = call.value()
        chain, whole = estimated(
            *(self.inspection, sample, kwargs, self.loss),
            capture=self.capture,
            device=self.kernels,
            dtype=self.dtype,
            rates=self.rates,
            anywhere=True,
        )
        return sharded(chain, self.sharing), whole

    def plan(self, chain: Chain, kept: int) -> Plan | CkptschedError:
        """The best plan that fits beside what is kept, or why there is none."""
        left = self.memory_bytes - kept
        if left <= 0:
            return WorkloadError(
                f"{format_bytes(kept)} are kept besides a step, of "
                f"{format_bytes(self.memory_bytes)}"
            )
        [found] = plan_each(chain, [left], **self.options)
        return found

    def largest(self, call: State, size: str, kept: int, plan: Plan) -> int:
        """The largest length of the inputs with which a plan fits; 0 where not even the least does.

        Args:
            call: The inputs.
            size: "batch" or "sequence"; the latter is found in steps of a sixteenth of what it is.
            kept: Bytes besides a step and a batch.
            plan: One for the inputs as they are, which gives a first guess.
        """
        now = _length(call, size)
        unit = 1 if size == "batch" else max(1, now // _PARTS)

        def fit(number: int) -> Fit:
            resized = _resized(call, size, now, number * unit)
            try:
                chain, _ = self.chain(resized)
            except ProfileError as error:  # such as a table of positions that is too short
                return WorkloadError(str(error))
            found = self.plan(chain, kept + _bytes_of(resized, self.dtype))
            return (
                found
                if isinstance(found, Plan | InfeasibleBudgetError)
                else WorkloadError(str(found))
            )

        fixed = sum(stage.parameter_gradient_bytes for stage in plan.chain.stages)
        share = (self.memory_bytes - kept - fixed) / max(plan.least_budget_bytes - fixed, 1)
        guess = max(1, int(share * now / unit))
        try:
            return search_sizes(fit, guess, _MOST).size * unit
        except CkptschedError:
            return 0


def _memory(figures: DeviceFigures | None, asked: int | str | None) -> int:
    if asked is None:
        if figures is None:
            raise WorkloadError(
                'neither a device nor its memory was given; give device="H100" or '
                'device_memory="80GiB"'
            )
        return int(DEVICE_SHARE * figures.memory_bytes)
    budget = parse_budget(asked)
    if budget.bytes is None:
        raise WorkloadError(
            f"device_memory={asked!r} is a share of a size that is not known; give bytes, such as "
            '"80GiB"'
        )
    return budget.bytes


def _sizes_asked(largest: Iterable[str]) -> tuple[str, ...]:
    sizes = (largest,) if isinstance(largest, str) else tuple(largest)
    for size in sizes:
        if size not in _SIZES:
            raise WorkloadError(
                f'largest={size!r} is not known; give "batch", "sequence" or both, as a list'
            )
    return sizes


def _dtype(asked: str | torch.dtype | None) -> torch.dtype | None:
    found = _DTYPES.get(asked) if isinstance(asked, str) else asked
    if asked is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise WorkloadError(f"the dtype {asked!r} is not known; give one of {', '.join(_DTYPES)}")


def _kernels(figures: DeviceFigures | None, call: State) -> torch.device:
    """The device whose kernels are meant."""
    if figures is None and call.leaves and call.leaves[0].device.type == "cpu":
        return torch.device("cpu")
    return torch.device("cuda")


def _rates(figures: DeviceFigures | None) -> Rates:
    if figures is None:
        return NOMINAL
    return Rates(
        flops_per_second=figures.flops_per_second,
        bytes_per_second=figures.bytes_per_second,
        by_dtype=figures.by_dtype(),
    )


def _bytes_of(call: State, dtype: torch.dtype | None) -> int:
    """Bytes of a batch."""
    return sum(leaf.numel() * _width(leaf, dtype) for leaf in call.leaves)


def _width(leaf: Tensor, dtype: torch.dtype | None) -> int:
    return dtype.itemsize if dtype and leaf.is_floating_point() else leaf.element_size()


def _length(call: State, size: str) -> int:
    """The length that inputs have in a dimension: that of the first input that has it."""
    dim = _SIZES[size]
    found = [leaf.shape[dim] for leaf in call.leaves if leaf.dim() > dim]
    if not found or not found[0]:
        raise WorkloadError(
            f"no input has a dimension {dim}, so there is no largest {size}; inputs are "
            + ", ".join(str(tuple(leaf.shape)) for leaf in call.leaves)
        )
    return int(found[0])


def _resized(call: State, size: str, now: int, length: int) -> State:
    """The inputs with another length, where they have that of now; their values go on."""
    dim = _SIZES[size]

    def resize(leaf: Tensor) -> Tensor:
        if leaf.dim() <= dim or leaf.shape[dim] != now:
            return leaf
        index = torch.arange(length, device=leaf.device) % now
        return leaf.detach().index_select(dim, index).requires_grad_(leaf.requires_grad)

    return call.replaced(resize(leaf) for leaf in call.leaves)


def _shown(dtype: torch.dtype | None) -> str:
    return "dtypes as they are" if dtype is None else str(dtype).removeprefix("torch.")
