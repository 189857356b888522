"""The peers of the executor's benchmark: other ways to take less memory for one training step.

Checkpoints are those of torch.utils.checkpoint in the form that its documentation recommends, and
keep no random state, which these networks do not need: peers at their best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from benchmarks.executor.networks import Network
from ckptsched.ode import ODEBlock

Forward = Callable[[Any], Any]

MEMORY_BUDGETS = (1.0, 0.7, 0.4, 0.2)
_QUICK_BUDGETS = (1.0, 0.5)
_INDUCTOR_BUDGETS = (1.0, 0.5, 0.2)
# The min-cut is found over all operations of the step at once, and takes more than linear time.
_MOST_COMPILED_STEPS = 200


@final
@dataclass(frozen=True)
class Peer:
    """A way to run a network's forward pass, from which a backward pass follows."""

    name: str
    forward: Forward
    fused: bool = False
    """Whether its kernels are not those of plain autograd, but fused ones."""


def eager_peers(network: Network) -> Iterator[Peer]:
    """Those that run PyTorch's own kernels, but for `checkpoint_sequential`."""
    blocks = [_runs(block.stages) for block in network.blocks]
    yield Peer("plain autograd", network.model)
    yield Peer("checkpoint per block", _each(blocks))
    yield Peer("checkpoint per step", _each(network.steps))
    yield Peer("recursive", _recursive(network.steps))
    if network.solves_odes:
        yield Peer("ANODE", _anode(network))


def sequential(network: Network, segments: int) -> Peer:
    """`checkpoint_sequential` over all steps; the last segment is not checkpointed."""
    steps = list(network.steps)

    def forward(x: Tensor) -> Any:
        return checkpoint_sequential(
            steps, segments, x, use_reentrant=False, preserve_rng_state=False
        )

    return Peer(f"sequential, {segments} segments", forward)


def segment_numbers(steps: int) -> list[int]:
    """Numbers of segments whose segments differ in length: all that `checkpoint_sequential` knows.

    Of long chains those near the square root, where memory is least, and a coarse grid.
    """
    lengths = {steps // k: k for k in range(steps, 1, -1)}
    numbers = sorted(set(lengths.values()))
    if len(numbers) <= 24:
        return numbers
    root = steps**0.5
    return [k for i, k in enumerate(numbers) if i % 6 == 0 or 0.8 * root <= k <= 1.5 * root]


def compiled_peers(network: Network, *, inductor: bool, quick: bool) -> Iterator[Peer]:
    """torch.compile with `activation_memory_budget`: what to keep is chosen operation by operation.

    With two backends: PyTorch's own kernels (the partitioner alone), and inductor's fused ones.
    """
    for budget in _QUICK_BUDGETS if quick else MEMORY_BUDGETS:
        forward = _compiled(network.model, budget, _partition_only())
        yield Peer(f"partitioner, budget {budget:g}", forward)
    for budget in _INDUCTOR_BUDGETS if inductor else ():
        forward = _compiled(network.model, budget, _inductor())
        yield Peer(f"inductor, budget {budget:g}", forward, fused=True)


def inductor_within(model: nn.Module, budget: float) -> Forward:
    """A model compiled by inductor, with an `activation_memory_budget`."""
    return _compiled(model, budget, _inductor())


def why_not_compiled(network: Network) -> str:
    """Why `compiled_peers` are left out; empty where they are not."""
    if len(network.steps) <= _MOST_COMPILED_STEPS:
        return ""
    return (
        f"torch.compile: it takes all {len(network.steps)} steps as one graph, and compiles 25 of "
        "them in 20 seconds already, a time that grows faster than their number"
    )


# ---- how they run --------------------------------------------------------------------------------


def _runs(steps: Sequence[Forward]) -> Forward:
    def forward(x: Any) -> Any:
        for step in steps:
            x = step(x)
        return x

    return forward


def _again(f: Forward, x: Any) -> Any:
    return checkpoint(f, x, use_reentrant=False, preserve_rng_state=False)


def _each(parts: Sequence[Forward]) -> Forward:
    def forward(x: Any) -> Any:
        for part in parts:
            x = _again(part, x)
        return x

    return forward


def _recursive(steps: Sequence[Forward]) -> Forward:
    """Halves, whose first is a checkpoint in turn: log n states, n log n / 2 runs more.

    Chen, Xu, Zhang, Guestrin, arXiv 1604.06174, section 4.4.
    """
    if len(steps) == 1:
        return steps[0]
    middle = len(steps) // 2
    first, second = _recursive(steps[:middle]), _recursive(steps[middle:])
    return lambda x: second(_again(first, x))


class _Again(torch.autograd.Function):
    """One ODE block as ANODE runs it: keeps its input, and tapes all steps in the backward."""

    @staticmethod
    def forward(ctx: Any, block: Forward, x: Tensor, *parameters: Tensor) -> Any:
        ctx.block, ctx.parameters = block, parameters
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        return None, *torch.autograd.grad(y, (x, *ctx.parameters), grads)


def _anode(network: Network) -> Forward:
    """ANODE (arXiv 1902.10298): a checkpoint per ODE block; other layers run plainly."""
    parts: list[Forward] = []
    for block in network.blocks:
        run = _runs(block.stages)
        parts.append(_taped_later(run, block.module) if isinstance(block.module, ODEBlock) else run)
    return _runs(parts)


def _taped_later(run: Forward, module: nn.Module) -> Forward:
    parameters = tuple(module.parameters())
    return lambda x: _Again.apply(run, x, *parameters)


def _compiled(model: nn.Module, budget: float, backend: Callable[..., Any]) -> Forward:
    """A compilation of its own, whatever was compiled before of the same model."""

    def compile_within(graph: Any, inputs: Any) -> Any:
        import torch._functorch.config as functorch

        with functorch.patch(activation_memory_budget=budget):
            return backend(graph, inputs)

    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * len(MEMORY_BUDGETS))
    return torch.compile(model, backend=compile_within, fullgraph=True, dynamic=False)


def _partition_only() -> Callable[..., Any]:
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.compilers import nop

    found: Callable[..., Any] = aot_autograd(
        fw_compiler=nop, bw_compiler=nop, partition_fn=min_cut_rematerialization_partition
    )
    return found


def _inductor() -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    found: Callable[..., Any] = compile_fx
    return found
