"""Chains for tests of plans and reports: small, of all shapes, with names and blocks."""

from hypothesis import strategies as st

from ckptsched.workload.chain import Chain
from ckptsched.workload.stage import Block, Stage

MIB = 2**20


def uniform_chain(stages: int = 16, name: str = "uniform") -> Chain:
    """Equal stages, as the steps of one ODE block."""
    stage = Stage(
        name="step",
        forward_seconds=0.010,
        backward_seconds=0.020,
        state_bytes=MIB,
        tape_bytes=4 * MIB,
        gradient_bytes=MIB,
        forward_overhead_bytes=MIB,
        backward_overhead_bytes=2 * MIB,
    )
    block = Block(name="ode", first=1, last=stages)
    return Chain(stages=(stage,) * stages, input_gradient_bytes=MIB, blocks=(block,), name=name)


def mixed_chain(name: str = "mixed") -> Chain:
    """Three blocks of four stages that grow smaller and dearer."""
    stages, blocks = [], []
    for b, scale in enumerate((4, 2, 1)):
        stage = Stage(
            name="step",
            forward_seconds=0.010 / scale,
            backward_seconds=0.025 / scale,
            state_bytes=scale * MIB,
            tape_bytes=3 * scale * MIB + 1000,
            gradient_bytes=scale * MIB,
            forward_overhead_bytes=scale * MIB // 2,
            backward_overhead_bytes=scale * MIB,
        )
        stages += [stage] * 4
        blocks.append(Block(name=f"block{b}", first=4 * b + 1, last=4 * b + 4))
    return Chain(
        stages=tuple(stages),
        input_gradient_bytes=4 * MIB,
        loss_seconds=0.001,
        blocks=tuple(blocks),
        name=name,
    )


@st.composite
def random_chains(draw: st.DrawFn, max_stages: int = 6) -> Chain:
    """Any small chain: seconds may be whole numbers, sizes may be zero."""
    seconds = st.one_of(st.integers(0, 20), st.floats(0, 20, allow_subnormal=False))
    size = st.integers(0, 12)
    stages = []
    for _ in range(draw(st.integers(1, max_stages))):
        state = draw(size)
        stages.append(
            Stage(
                name=draw(st.sampled_from(["", "conv", "Größe \N{GREEK SMALL LETTER DELTA}"])),
                forward_seconds=draw(seconds),
                backward_seconds=draw(seconds),
                state_bytes=state,
                tape_bytes=state + draw(size),
                gradient_bytes=draw(size),
                forward_overhead_bytes=draw(size),
                backward_overhead_bytes=draw(size),
                parameter_gradient_bytes=draw(size),
            )
        )
    return Chain(
        stages=tuple(stages),
        input_bytes=draw(size),
        input_gradient_bytes=draw(size),
        loss_seconds=draw(seconds),
        loss_overhead_bytes=draw(size),
        held_bytes=draw(size),
        name=draw(st.sampled_from(["", "net"])),
    )
