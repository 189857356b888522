"""Chains to measure on: seeded, the same on every machine, of the shapes that networks have.

Sizes are bytes and times seconds, rounded to a byte and a tenth of a microsecond so that no sum
depends on the machine. Only the order of magnitude is taken from real networks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from ckptsched.workload.chain import Chain

MIB = 2**20
_Figures: TypeAlias = dict[str, float]  # one stage, in bytes and milliseconds
Maker: TypeAlias = Callable[[int, int], Chain]
"""Makes a chain of so many stages from a seed."""

_ODE_STATES = (16, 12, 8, 6, 4, 3, 2, 1)  # of the blocks, in units of 4 MiB
_ODE_MILLISECONDS = (1.6, 1.3, 1.2, 1.1, 1.0, 0.9, 0.9, 0.8)  # of one step


def uniform(n: int, tape: int = 4, overhead: int = 1) -> Chain:
    """Equal stages: a state of one unit, a tape of several, a backward twice as long.

    Args:
        n: Number of stages.
        tape: Units of a tape; 1 is what tape-as-checkpoint schedules assume.
        overhead: Units that a forward needs on the side; a backward needs twice as many.
    """
    step = {"u_f": 1.0, "u_b": 2.0, "w_a": MIB, "w_t": tape * MIB}
    step |= {"o_f": overhead * MIB, "o_b": 2 * overhead * MIB}
    return _chain(f"uniform_n{n}_t{tape}", MIB, [step] * n)


def ode_network(blocks: int = 8, steps: int = 1000) -> Chain:
    """Blocks of equal RK4 steps behind a transition each; `instances/ode_*` are of these.

    Args:
        blocks: Number of blocks, 8 at most.
        steps: Steps a block.
    """
    unit, stages = 4 * MIB, []
    for a, milliseconds in zip(_ODE_STATES[:blocks], _ODE_MILLISECONDS[:blocks], strict=True):
        first, size = round(0.6 * milliseconds, 4), a * unit
        stages.append(
            {"u_f": first, "u_b": round(2 * first, 4), "w_a": size, "w_t": 3 * size}
            | {"o_f": size, "o_b": size}
        )
        step = {"u_f": milliseconds, "u_b": round(2.1 * milliseconds, 4), "w_a": size}
        stages += [step | {"w_t": 13 * size, "o_f": size, "o_b": 2 * size}] * steps
    return _chain(f"ode_L{blocks}_Nt{steps}", _ODE_STATES[0] * unit, stages)


def heterogeneous(n: int, seed: int) -> Chain:
    """Independent stages: states log-uniform from 1 to 64 MiB, tapes 1 to 6 times those."""
    draw = random.Random(1000 * n + seed)
    return _chain(
        f"heterogeneous_n{n}_{seed}",
        _log_uniform(draw, 1, 64),
        [_stage(draw, _log_uniform(draw, 1, 64), (1.0, 6.0)) for _ in range(n)],
    )


def transformer(blocks: int, seed: int) -> Chain:
    """An embedding, blocks of attention and MLP as two stages, a head with a large tape."""
    draw = random.Random(blocks + seed)
    state = draw.choice((8, 24, 48)) * MIB
    stages = [{"u_f": 0.1, "u_b": 0.2, "w_a": state, "w_t": state, "o_f": 0, "o_b": state}]
    attention = draw.uniform(8, 14), draw.uniform(4, 9)  # tape in states, milliseconds
    mlp = draw.uniform(12, 20), draw.uniform(8, 16)
    for _ in range(blocks):
        for tape, milliseconds in (attention, mlp):
            stages.append(
                {"u_f": round(milliseconds, 4), "u_b": round(2 * milliseconds, 4), "w_a": state}
                | {"w_t": int(tape * state), "o_f": 2 * state, "o_b": 4 * state}
            )
    stages.append(
        {"u_f": 8.4, "u_b": 16.9, "w_a": 4, "w_t": 14 * state, "o_f": 4 * state, "o_b": 4 * state}
    )
    return _chain(f"transformer_{blocks}_{seed}", MIB // 64, stages)


def convolutional(n: int, seed: int) -> Chain:
    """As a ResNet: states rise at the stem, then halve at each of three places."""
    return _profiled("convolutional", n, seed, lambda x: 96.0 / 2 ** int(4 * x))


def generator(n: int, seed: int) -> Chain:
    """As an image generator: states double at each of three places."""
    return _profiled("generator", n, seed, lambda x: 12.0 * 2 ** int(4 * x))


def autoencoder(n: int, seed: int) -> Chain:
    """States fall to the middle, then rise."""
    return _profiled("autoencoder", n, seed, lambda x: 64.0 / 2 ** int(8 * min(x, 1 - x)))


def unet(n: int, seed: int) -> Chain:
    """A U-Net as a chain: states carry what skips to the other side, so they rise, then fall."""

    def size(x: float) -> float:
        level = int(8 * min(x, 1 - x))
        return sum((48.0, 24.0, 12.0, 6.0, 3.0)[: level + 1])

    return _profiled("unet", n, seed, size)


_SHAPES: dict[str, Maker] = {
    "heterogeneous": heterogeneous,
    "convolutional": convolutional,
    "generator": generator,
    "autoencoder": autoencoder,
    "unet": unet,
}
# Stages of the chains that `seeded` makes where no others are asked for.
LENGTHS = (5, 9, 14, 24, 40, 64, 100, 150)


def seeded(lengths: Sequence[int] = LENGTHS, seed: int = 1) -> list[Chain]:
    """One chain of every shape and length, few stages first."""
    chains = [make(n, seed) for n in lengths for make in _SHAPES.values()]
    chains += [transformer(blocks, seed) for blocks in (3, 12, 32) if 2 * blocks <= max(lengths)]
    return chains


def _profiled(shape: str, n: int, seed: int, mebibytes: Callable[[float], float]) -> Chain:
    """A chain whose states follow a profile over 0..1, times a tenth either way."""
    draw = random.Random(f"{shape} {n} {seed}")
    stages = []
    for i in range(n):
        state = int(MIB * mebibytes(i / n) * draw.uniform(0.9, 1.1))
        stages.append(_stage(draw, state, (1.5, 5.0)))
    return _chain(f"{shape}_n{n}_{seed}", int(MIB * draw.uniform(4, 20)), stages)


def _stage(draw: random.Random, state: int, tape: tuple[float, float]) -> _Figures:
    milliseconds = draw.lognormvariate(0.0, 0.7)
    return {
        "u_f": round(milliseconds, 4),
        "u_b": round(milliseconds * draw.uniform(1.5, 2.5), 4),
        "w_a": state,
        "w_t": int(state * draw.uniform(*tape)),
        "o_f": int(state * draw.uniform(0.0, 0.5)),
        "o_b": int(state * draw.uniform(0.0, 1.0)),
    }


def _log_uniform(draw: random.Random, low: float, high: float) -> int:
    return int(MIB * low * (high / low) ** draw.random())


def _chain(name: str, input_bytes: int, stages: Sequence[_Figures]) -> Chain:
    columns: dict[str, Any] = {key: [x[key] for x in stages] for key in stages[0]}
    columns["w_a"].insert(0, input_bytes)
    return Chain.from_json({"name": name, "size_unit": "bytes", "time_unit": "ms", **columns})
