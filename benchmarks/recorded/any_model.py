"""Models as people have them: what memory costs in time, beside what people use today.

    python -m benchmarks.recorded.any_model
    python -m benchmarks.recorded.any_model --models gpt2 unet --rounds 7 --json any_model.json

Each model is built small from its configuration, with random weights, and takes part as it comes.
For budgets between the least one and storing everything a row shows the measured peak, the
projected overhead, and the measured one: processor seconds of a step by the plan over those by
plain autograd, in turn. Then the planner is given the measured peak of what people use today:
checkpoints on every block or every second one, selective checkpointing that saves matrix products,
the switches that transformers and timm have for it, torchvision's `memory_efficient`. What of these
fails on a model is said, and left out. Language models keep no cache, with which torch's selective
checkpointing fails. All of a model runs in one process, on one thread. transformers,
timm and diffusers are needed for the models that are theirs.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import ckptsched as cs
from benchmarks.each_model import measure_each
from ckptsched.memory.meters import default_meter
from ckptsched.profiler.profile import loss_of_tensors
from ckptsched.workload.chain import Chain

SHARES = (30, 40, 50, 60, 70)
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


@dataclass(frozen=True)
class Case:
    """A model, a batch for it, and the parts that people would checkpoint."""

    model: nn.Module
    batch: dict[str, Any]
    loss: Callable[[Any], Tensor]
    blocks: Callable[[nn.Module], Iterable[nn.Module]]
    without_saving: nn.Module | None = None
    """The same model where `model` itself saves memory in a way of its own."""


def _own_loss(output: Any) -> Tensor:
    loss: Tensor = output.loss
    return loss


def _mean_square(output: Any) -> Tensor:
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor.float().square().mean()


def _language(kind: str, **more: Any) -> Case:
    import transformers

    config = getattr(transformers, f"{kind}Config")(vocab_size=512, **more)
    heads = {"GPT2": "GPT2LMHeadModel", "Llama": "LlamaForCausalLM", "Bert": "BertForMaskedLM"}
    config.use_cache = False  # no training step uses it, and checkpoints would run on a grown one
    model = getattr(transformers, heads[kind])(config)
    ids = torch.randint(512, (8, 128), generator=torch.Generator().manual_seed(0))
    lists = {"GPT2": "transformer.h", "Llama": "model.layers", "Bert": "bert.encoder.layer"}
    return Case(
        model,
        {"input_ids": ids, "labels": ids.clone()},
        _own_loss,
        lambda net: net.get_submodule(lists[kind]).children(),
    )


def gpt2(layers: int = 12) -> Case:
    """GPT-2 of some layers and width 128."""
    return _language("GPT2", n_layer=layers, n_embd=128, n_head=4, n_positions=128)


def llama() -> Case:
    """A model like Llama, of 8 layers."""
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4}
    return _language("Llama", num_hidden_layers=8, **sizes)


def bert() -> Case:
    """BERT of 8 layers."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    return _language("Bert", num_hidden_layers=8, **sizes)


def vit() -> Case:
    """timm's vision transformer of 12 layers."""
    import timm

    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 128, "num_heads": 4, "num_classes": 10}
    model = timm.create_model("vit_small_patch16_224", depth=12, **sizes)
    return Case(model, {"x": torch.randn(16, 3, 64, 64)}, _mean_square, lambda net: net.blocks)


def _of_torchvision(name: str, batch: int, side: int, blocks: Any, **more: Any) -> Case:
    import torchvision

    model = getattr(torchvision.models, name)(num_classes=10, **more)
    return Case(model, {"x": torch.randn(batch, 3, side, side)}, _mean_square, blocks)


def _residual_blocks(net: nn.Module) -> Iterable[nn.Module]:
    return [m for m in net.modules() if type(m).__name__ in ("BasicBlock", "Bottleneck")]


def resnet50() -> Case:
    """torchvision's ResNet-50, batch 24 of 64 x 64."""
    return _of_torchvision("resnet50", 24, 64, _residual_blocks)


def densenet121() -> Case:
    """torchvision's DenseNet-121 with `memory_efficient`, batch 16 of 64 x 64."""
    torch.manual_seed(0)
    plain = _of_torchvision("densenet121", 16, 64, lambda net: ())
    torch.manual_seed(0)
    lean = _of_torchvision("densenet121", 16, 64, lambda net: (), memory_efficient=True)
    return Case(lean.model, plain.batch, _mean_square, lambda net: (), plain.model)


class UNet(nn.Module):
    """A U-Net of some levels: two convolutions a level on either side, and skip connections."""

    def __init__(self, levels: int = 3, width: int = 16) -> None:
        super().__init__()

        def block(before: int, after: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for a, b in ((before, after), (after, after)):
                layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
            return nn.Sequential(*layers)

        widths = [width * 2**k for k in range(levels + 1)]
        pairs = list(zip([3, *widths[:-2]], widths[:-1], strict=True))
        self.down = nn.ModuleList([block(a, b) for a, b in pairs])
        self.middle = block(widths[-2], widths[-1])
        self.up = nn.ModuleList(
            [block(widths[k] + widths[k + 1], widths[k]) for k in reversed(range(levels))]
        )
        self.last = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Go down, and up again.

        Args:
            x: Images, of which both sides can be halved once a level.
        """
        skips = []
        for block in self.down:
            skips.append(x := block(x))
            x = nn.functional.max_pool2d(x, 2)
        x = self.middle(x)
        for block in self.up:
            x = nn.functional.interpolate(x, scale_factor=2.0)
            x = block(torch.cat([x, skips.pop()], 1))
        out: Tensor = self.last(x)
        return out


def unet() -> Case:
    """A U-Net of three levels, batch 8 of 64 x 64."""
    return Case(
        UNet(),
        {"x": torch.randn(8, 3, 64, 64)},
        _mean_square,
        lambda net: [*net.down, net.middle, *net.up],
    )


def diffusion() -> Case:
    """diffusers' UNet2DModel of three levels."""
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=(32, 64, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    return Case(
        model,
        {"sample": torch.randn(4, 3, 32, 32), "timestep": torch.tensor([3, 5, 7, 9])},
        lambda output: _mean_square(output.sample),
        lambda net: [*net.down_blocks, net.mid_block, *net.up_blocks],
    )


CASES: dict[str, Callable[[], Case]] = {
    "gpt2": gpt2,
    "llama": llama,
    "bert": bert,
    "vit": vit,
    "resnet50": resnet50,
    "densenet121": densenet121,
    "unet": unet,
    "diffusion": diffusion,
}


# -- what people use today


def with_checkpoints(case: Case, every: int, context_fn: Any = None) -> nn.Module:
    """A copy of the model of which each so many blocks run under torch's checkpoint.

    Args:
        case: The model.
        every: 1 for every block.
        context_fn: As torch's checkpoint takes it.
    """
    model = copy.deepcopy(case.model)
    more = {} if context_fn is None else {"context_fn": context_fn}
    for block in list(case.blocks(model))[::every]:
        forward = block.forward
        block.forward = functools.partial(checkpoint, forward, use_reentrant=False, **more)
    return model


def _saves_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saves = op in _PRODUCTS
    return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE


def peers(case: Case) -> dict[str, nn.Module]:
    """The model in the ways in which people save memory."""
    if case.without_saving is not None:
        return {"memory_efficient": case.model}
    products = functools.partial(create_selective_checkpoint_contexts, _saves_products)
    return {
        "checkpoint, every block": with_checkpoints(case, 1),
        "checkpoint, every second": with_checkpoints(case, 2),
        "selective, saves products": with_checkpoints(case, 1, products),
        **switched_on(case),
    }


def switched_on(case: Case) -> dict[str, nn.Module]:
    """Copies of the model with the switch of its library turned on, by the switch's name."""
    calls: dict[str, dict[str, Any]] = {
        "gradient_checkpointing_enable": {
            "gradient_checkpointing_kwargs": {"use_reentrant": False}
        },
        "set_grad_checkpointing": {},
    }
    found = {}
    for name, arguments in calls.items():
        if callable(getattr(case.model, name, None)):
            found[name] = copy.deepcopy(case.model)
            getattr(found[name], name)(**arguments)
    return found


def running(peers: dict[str, nn.Module], case: Case) -> dict[str, int]:
    """The peaks of those that run; what fails is said by its name."""
    peaks = {}
    for way, model in peers.items():
        try:
            peaks[way] = peak_of(model, case)
        except Exception as error:
            said = str(error).partition("\n")[0]
            print(f"{way:34}fails: {type(error).__name__}: {said}", flush=True)
    return peaks


# -- measuring


def step(model: nn.Module, case: Case) -> Tensor:
    """One forward and backward; gradients are let go before."""
    model.zero_grad(set_to_none=True)
    loss = case.loss(model(**case.batch))
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def peak_of(model: nn.Module, case: Case) -> int:
    """Bytes of a step at its peak."""
    step(model, case)
    model.zero_grad(set_to_none=True)
    with default_meter(torch.device("cpu")).window() as window:
        step(model, case)
        window.mark()
    return window.phases[0].peak_bytes


def seconds_of(models: dict[str, nn.Module], case: Case, rounds: int) -> dict[str, float]:
    """Processor seconds of a step of each, in turn: the median of rounds."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            start = time.process_time()
            step(model, case)
            found[name].append(time.process_time() - start)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


@dataclass(frozen=True)
class Row:
    """One model at one budget; times are over those of plain autograd, bytes over its peak."""

    model: str
    way: str
    share: float
    peak: float
    projected: float | None
    measured: float


def rows_of(name: str, case: Case, rounds: int) -> tuple[list[Row], dict[str, float]]:
    """All rows of a model, and what preparing it took; both are printed once they are known."""
    plain = case.without_saving or case.model
    start = time.process_time()
    chains = chains_of(plain, case)
    profiled = time.process_time() - start
    start = time.process_time()
    fronts = [cs.plan(chain, budget="100%") for chain in chains]
    planned = time.process_time() - start
    whole, least = fronts[0].store_all_bytes, min(x.least_budget_bytes for x in fronts)
    facts = {
        "stages": len(chains[0]),
        "least": least / whole,
        "profile_seconds": profiled,
        "plan_seconds": planned,
        "store_all_bytes": whole,
    }
    print(f"\n{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in facts.items()))
    print(f"{'':34}{'peak':>8}{'projected':>11}{'measured':>10}", flush=True)
    budgets = {f"{share} %": share * whole // 100 for share in SHARES}
    budgets = {n: b for n, b in {"least": least, **budgets, "100 %": whole}.items() if b >= least}
    rows = _compared(name, case, plain, chains, budgets, {}, rounds)
    others = peers(case)
    peaks = running(others, case)
    others = {way: others[way] for way in peaks}
    budgets = {f"plan at {way}": b for way, b in peaks.items() if least <= b}
    return rows + _compared(name, case, plain, chains, budgets, others, rounds), facts


def chains_of(model: nn.Module, case: Case) -> list[Chain]:
    """The model as a chain in each way to cut it that `fit` and `plan` compare.

    Args:
        model: The model, or one without a way of its own to save memory.
        case: Its batch and loss.
    """
    found: dict[tuple[int, ...], Chain] = {}
    for cuts in ("lean", "dear"):
        captured = cs.captured(model, kwargs=case.batch, cuts=cuts)  # type: ignore[arg-type]
        if captured.cuts not in found:
            loss, inputs = loss_of_tensors(captured, case.loss), captured.take(**case.batch)
            found[captured.cuts] = cs.profile(captured, inputs, loss=loss)
    return list(found.values())


def cheapest(chains: Sequence[Chain], budget: int) -> cs.Plan:
    """The plan that costs least time within a budget of bytes, for any of some chains."""
    found, error = [], None
    for chain in chains:
        try:
            found.append(cs.plan(chain, budget=budget))
        except cs.InfeasibleBudgetError as failure:
            error = failure
    if not found:
        assert error is not None
        raise error
    return min(found, key=lambda plan: plan.overhead)


def _compared(
    name: str,
    case: Case,
    plain: nn.Module,
    chains: Sequence[Chain],
    budgets: dict[str, int],
    others: dict[str, nn.Module],
    rounds: int,
) -> list[Row]:
    plans = {way: cheapest(chains, budget) for way, budget in budgets.items()}
    models: dict[str, nn.Module] = {way: cs.checkpointed(plain, p) for way, p in plans.items()}
    models = {"plain": plain, **models, **others}
    peaks = {way: peak_of(model, case) for way, model in models.items()}
    seconds = seconds_of(models, case, rounds)
    whole = peaks["plain"]
    rows = [
        Row(
            model=name,
            way=way,
            share=plans[way].budget_bytes / chain_whole(plans[way]) if way in plans else 0.0,
            peak=peaks[way] / whole,
            projected=plans[way].overhead if way in plans else None,
            measured=seconds[way] / seconds["plain"] - 1,
        )
        for way in models
        if way != "plain"
    ]
    for row in rows:
        said = "" if row.projected is None else f"{row.projected:+.3f}"
        print(f"{row.way:34}{row.peak:8.3f}{said:>11}{row.measured:+10.3f}", flush=True)
    return rows


def chain_whole(plan: cs.Plan) -> int:
    """What storing everything takes."""
    return plan.store_all_bytes


def measured(name: str, case: Case, rounds: int) -> dict[str, Any]:
    """Measure a model and print it; facts and rows as JSON data."""
    rows, facts = rows_of(name, case, rounds)
    return {**facts, "rows": [asdict(row) for row in rows]}


def main() -> None:
    """Measure, print, and write what was measured if asked to."""
    measure_each(CASES, measured, __doc__, rounds=5, ignored=cs.TimingWarning)


if __name__ == "__main__":
    main()
