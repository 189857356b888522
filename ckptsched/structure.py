"""What of a model a plan depends on: its blocks, parameters, buffers and modes."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .context import Autocast
from .stages import Signature
from .tracing import Block

_INDEX = re.compile(r"\[\d+\]$")
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+\b")


def stage_label(block: Block, name: str) -> str:
    """Name of a stage within its block, equal for all steps of an ODE."""
    inner = name.removeprefix(block.name).removeprefix(".") if block.name else name
    return _INDEX.sub("", inner)


def structure_digest(blocks: Iterable[Block]) -> str:
    """SHA-256 of the blocks, their stages, how they print, and what tensors they own."""
    described = []
    order: dict[int, int] = {}  # first appearance of each tensor: tells shared ones
    for block in blocks:
        owned = [
            (
                name,
                order.setdefault(id(tensor), len(order)),
                list(tensor.shape),
                tensor.stride(),
                str(tensor.dtype),
                tensor.requires_grad,
            )
            for name, tensor in (*block.module.named_parameters(), *block.module.named_buffers())
        ]
        names = (stage_label(block, stage.name) for stage in block.stages)
        labels = [(label, len(list(same))) for label, same in itertools.groupby(names)]
        # What modules print of themselves tells a kernel size or an integrator; an address in it
        # would differ from process to process.
        printed = _ADDRESS.sub("", repr(block.module))
        described.append((block.name, printed, labels, owned))
    text = json.dumps(described, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def training_mode(model: nn.Module) -> str:
    """Which modules train: "train", "eval", or a digest where they differ."""
    flags = [module.training for module in model.modules()]
    if all(flags):
        return "train"
    if not any(flags):
        return "eval"
    return "mixed " + hashlib.sha256(bytes(flags)).hexdigest()[:12]


def sign(model: nn.Module, blocks: Iterable[Block], x: Tensor) -> Signature:
    """The signature of a model and one batch."""
    return Signature(
        structure=structure_digest(blocks),
        input_shape=tuple(x.shape),
        input_stride=tuple(x.stride()),
        input_dtype=str(x.dtype),
        input_requires_grad=x.requires_grad,
        device=x.device.type,
        threads=torch.get_num_threads(),
        training=training_mode(model),
        autocast=str(Autocast.take(x.device)),
        torch_version=str(torch.__version__),
    )
