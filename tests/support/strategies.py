"""Hypothesis strategies: chains of the planning model, and chains with exact bytes."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from ckptsched.workload.chain import Chain
from ckptsched.workload.stage import Block, Stage, StageLedger, StageParts, TapeOption

SMALL = st.integers(0, 6)
SECONDS = st.integers(0, 9).map(float)


@st.composite
def stages(draw: st.DrawFn, extras: bool = True) -> Stage:
    """A stage with small numbers; extras are gradients of their own size and the like."""
    state = draw(SMALL)
    return Stage(
        forward_seconds=draw(SECONDS),
        backward_seconds=draw(SECONDS),
        state_bytes=state,
        tape_bytes=state + draw(SMALL),
        gradient_bytes=draw(SMALL) if extras else state,
        forward_overhead_bytes=draw(SMALL),
        backward_overhead_bytes=draw(SMALL),
        parameter_gradient_bytes=draw(SMALL) if extras else 0,
    )


@st.composite
def chains(draw: st.DrawFn, most_stages: int = 4, extras: bool = True) -> Chain:
    """A chain without exact bytes."""
    links = draw(st.lists(stages(extras), min_size=1, max_size=most_stages))
    size = draw(SMALL)
    return Chain(
        stages=tuple(links),
        input_bytes=size,
        input_gradient_bytes=draw(SMALL) if extras else size,
        loss_seconds=draw(SECONDS),
        loss_overhead_bytes=draw(SMALL) if extras else 0,
        held_bytes=draw(SMALL) if extras else 0,
    )


@st.composite
def tape_options(draw: st.DrawFn, state_bytes: int) -> TapeOption:
    """Another tape of a stage: it may be better or worse than its own in any respect."""
    return TapeOption(
        name=draw(st.sampled_from(["", "slopes"])),
        tape_bytes=state_bytes + draw(SMALL),
        forward_seconds=draw(SECONDS),
        backward_seconds=draw(SECONDS),
        forward_overhead_bytes=draw(SMALL),
        backward_overhead_bytes=draw(SMALL),
    )


@st.composite
def chains_with_options(draw: st.DrawFn, most_stages: int = 3, most_options: int = 2) -> Chain:
    """A chain without exact bytes, whose stages offer further tapes."""
    chain = draw(chains(most_stages))
    links = []
    for stage in chain.stages:
        option = tape_options(stage.state_bytes)
        others = draw(st.lists(option, min_size=0, max_size=most_options))
        links.append(replace(stage, other_tapes=tuple(others)))
    return replace(chain, stages=tuple(links))


@st.composite
def scaled_chains(draw: st.DrawFn, most_stages: int = 4) -> Chain:
    """A chain whose sizes share no unit that is not tiny beside them."""
    data = draw(chains(most_stages)).to_json()
    factor, noise = draw(st.integers(1000, 100_000)), st.integers(0, 999)
    for key in ("w_a", "w_t", "w_g", "o_f", "o_b", "w_p"):
        data[key] = [factor * x + draw(noise) for x in data[key]]
    data["w_t"] = [max(t, a) for t, a in zip(data["w_t"], data["w_a"][1:], strict=True)]
    return Chain.from_json(data)


@st.composite
def uniform_chains(draw: st.DrawFn, most_stages: int = 12) -> Chain:
    """Equal stages."""
    stage = draw(stages(extras=False))
    return Chain(
        stages=(stage,) * draw(st.integers(1, most_stages)),
        input_bytes=stage.state_bytes,
        input_gradient_bytes=stage.state_bytes,
    )


@st.composite
def ledgers(draw: st.DrawFn, views: bool = True) -> StageLedger:
    """Exact bytes of a stage, as they can be: what is held longer never lowers a peak."""
    view = views and draw(st.booleans())
    state, tape = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    own = 0 if view else state
    free, if_input, if_output = draw(SMALL), draw(SMALL), draw(SMALL)
    first = draw(SMALL)
    peaks = [
        free + if_input * held + if_output * output + first * new
        for held in (0, 1)
        for output in (0, 1)
        for new in (0, 1)
    ]
    return StageLedger(
        state_bytes=state,
        output_is_view=view,
        tape_bytes=tape,
        input_saved=draw(st.booleans()),
        output_saved=draw(st.booleans()),
        forward_peak_bytes=own + draw(SMALL),
        taped_peak_bytes=own + tape + draw(SMALL),
        backward_peak_bytes=tuple(peaks),
        shares_parameters_partly=draw(st.booleans()),
    )


@st.composite
def ledger_chains(
    draw: st.DrawFn, most_stages: int = 4, noise: bool = False, views: bool = True
) -> Chain:
    """A chain with exact bytes, and planning sizes that bound them from above.

    Args:
        draw: Hypothesis.
        most_stages: Length at most.
        noise: Whether buffers are cloned and random states are kept, which the planning
            model does not know.
        views: Whether some stages return views of their inputs.
    """
    exact = draw(st.lists(ledgers(views), min_size=1, max_size=most_stages))
    gradients = [draw(SMALL) for _ in range(len(exact) + 1)]
    links, storage = [], 0
    size = draw(SMALL)
    storage = size
    for i, ledger in enumerate(exact, 1):
        parameters = draw(SMALL)
        new = gradients[i - 1]  # what a backward leaves is there at its end
        peaks = ledger.backward_peak_bytes
        peaks = tuple(peak + new + parameters * (k % 2) for k, peak in enumerate(peaks))
        ledger = replace(ledger, backward_peak_bytes=peaks)
        storage = storage if ledger.output_is_view else ledger.state_bytes
        own = 0 if ledger.output_is_view else ledger.state_bytes
        tape = ledger.tape_bytes + storage
        links.append(
            Stage(
                forward_seconds=draw(SECONDS),
                backward_seconds=draw(SECONDS),
                state_bytes=storage,
                tape_bytes=tape,
                gradient_bytes=gradients[i],
                forward_overhead_bytes=max(
                    ledger.forward_peak_bytes - own,
                    ledger.taped_peak_bytes - own - ledger.tape_bytes,
                ),
                backward_overhead_bytes=max(
                    0, max(ledger.backward_peak_bytes) - gradients[i - 1] - parameters
                ),
                parameter_gradient_bytes=parameters,
                ledger=ledger,
            )
        )
    n = len(links)
    blocks = ()
    if noise:
        cuts = sorted(draw(st.sets(st.integers(1, n), max_size=2)) | {n})
        blocks = tuple(
            Block(name=f"b{b}", first=a + 1, last=b, buffer_bytes=draw(SMALL))
            for a, b in zip([0, *cuts[:-1]], cuts, strict=True)
        )
    return Chain(
        stages=tuple(links),
        input_bytes=size,
        input_gradient_bytes=gradients[0],
        loss_seconds=draw(SECONDS),
        loss_overhead_bytes=draw(SMALL),
        held_bytes=storage,
        random_state_bytes=draw(SMALL) if noise else 0,
        blocks=blocks,
    )


@st.composite
def _parted(
    draw: st.DrawFn, inputs: int, *, last: bool = False, equal: bool = False
) -> StageLedger:
    """Exact bytes of a stage whose states lie in several storages, some of them handed on.

    Args:
        draw: Hypothesis.
        inputs: Storages of its input.
        last: Whether all of its output is new.
        equal: Whether its output has as many storages as its input, so that it can be repeated.
    """
    handed = [k for k in range(inputs) if not last and draw(st.booleans())]
    fewest, most = (0 if handed else 1), (1 if last else 2)
    if equal:
        fewest = most = inputs - len(handed)
    new = draw(st.lists(SMALL, min_size=fewest, max_size=most))
    sources = draw(st.permutations([*handed, *[-1] * len(new)]))
    fresh = [k for k, source in enumerate(sources) if source < 0]
    sizes = dict(zip(fresh, new, strict=True))
    parts = StageParts(
        inputs=inputs,
        output_bytes=tuple(sizes.get(k, 0) for k in range(len(sources))),
        output_sources=tuple(sources),
        saved_inputs=(),
        saved_outputs=(),
        backward_peak_bytes=(),
    )
    return _taped(draw, parts, sum(new) + draw(SMALL))


def _taped(draw: st.DrawFn, parts: StageParts, forward_peak_bytes: int) -> StageLedger:
    """Exact bytes with a tape of a stage that reads and makes such storages."""
    fresh = [k for k, source in enumerate(parts.output_sources) if source < 0]
    saved_inputs = tuple(k for k in range(parts.inputs) if draw(st.booleans()))
    saved_outputs = tuple(k for k in fresh if draw(st.booleans()))
    count = len(saved_inputs) + len(saved_outputs)
    free, more, longer = draw(SMALL), draw(SMALL), [draw(SMALL) for _ in range(count)]
    peaks = [
        free + more * first + sum(x for k, x in enumerate(longer) if mask >> k & 1)
        for first in (0, 1)
        for mask in range(1 << count)
    ]
    tape = draw(SMALL)
    return StageLedger(
        state_bytes=parts.new_bytes,
        output_is_view=False,
        tape_bytes=tape,
        input_saved=len(saved_inputs) == parts.inputs,
        output_saved=bool(fresh) and len(saved_outputs) == len(fresh),
        forward_peak_bytes=forward_peak_bytes,
        taped_peak_bytes=parts.new_bytes + tape + draw(SMALL),
        backward_peak_bytes=(free, free + more) * 4,
        parts=replace(
            parts,
            saved_inputs=saved_inputs,
            saved_outputs=saved_outputs,
            backward_peak_bytes=tuple(peaks),
        ),
    )


def _parted_stage(
    draw: st.DrawFn, ledger: StageLedger, whole: int, gradients: tuple[int, int]
) -> Stage:
    """A stage with such a ledger.

    Args:
        draw: Hypothesis.
        ledger: Its ledger; peaks of the backward come without gradients.
        whole: Bytes of its output.
        gradients: Bytes of the gradients of its input and output.
    """
    parameters = draw(SMALL)
    ledger = _with_gradients(ledger, gradients[0], parameters)
    return Stage(
        forward_seconds=draw(SECONDS),
        backward_seconds=draw(SECONDS),
        state_bytes=whole,
        tape_bytes=ledger.tape_bytes + whole,
        gradient_bytes=gradients[1],
        # Some room: the planning model does not judge a chain with a ledger.
        forward_overhead_bytes=ledger.taped_peak_bytes + ledger.forward_peak_bytes,
        backward_overhead_bytes=_highest(ledger),
        parameter_gradient_bytes=parameters,
        ledger=ledger,
    )


def _with_gradients(ledger: StageLedger, gradient: int, parameters: int) -> StageLedger:
    """The ledger with the gradients that a backward makes in its peaks."""
    assert ledger.parts is not None
    half = len(ledger.parts.backward_peak_bytes) // 2
    peaks = tuple(
        peak + gradient + parameters * (k >= half)
        for k, peak in enumerate(ledger.parts.backward_peak_bytes)
    )
    return replace(ledger, parts=replace(ledger.parts, backward_peak_bytes=peaks))


def _highest(ledger: StageLedger) -> int:
    assert ledger.parts is not None
    return max(ledger.parts.backward_peak_bytes)


@st.composite
def parted_chains_with_tapes(
    draw: st.DrawFn, most_stages: int = 4, most_options: int = 1, to_output: bool = False
) -> Chain:
    """A chain with exact bytes, some of whose stages offer another tape that keeps others.

    Args:
        draw: Hypothesis.
        most_stages: Length at most.
        most_options: Further tapes of a stage at most.
        to_output: Whether the output may have storages of earlier states.
    """
    chain = draw(parted_chains(most_stages, to_output))
    links = []
    before = chain.input_gradient_bytes
    for stage in chain.stages:
        own = stage.ledger
        assert own is not None
        assert own.parts is not None
        tapes = []
        for _ in range(draw(st.integers(0, most_options))):
            drawn = _taped(draw, own.parts, own.forward_peak_bytes)
            ledger = _with_gradients(drawn, before, stage.parameter_gradient_bytes)
            tapes.append(
                TapeOption(
                    name="lean",
                    tape_bytes=ledger.tape_bytes + stage.state_bytes,
                    forward_seconds=stage.forward_seconds,
                    backward_seconds=draw(SECONDS),
                    forward_overhead_bytes=ledger.taped_peak_bytes + ledger.forward_peak_bytes,
                    backward_overhead_bytes=_highest(ledger),
                    ledger=ledger,
                )
            )
        links.append(replace(stage, other_tapes=tuple(tapes)))
        before = stage.gradient_bytes
    return replace(chain, stages=tuple(links))


def _handed_on(state: list[int], ledger: StageLedger) -> list[int]:
    """Bytes of each storage of a stage's output."""
    parts = ledger.parts
    assert parts is not None
    known = zip(parts.output_bytes, parts.output_sources, strict=True)
    return [size if source < 0 else state[source] for size, source in known]


@st.composite
def parted_chains(draw: st.DrawFn, most_stages: int = 5, to_output: bool = False) -> Chain:
    """A chain whose states lie in several storages, which stages may hand on.

    Args:
        draw: Hypothesis.
        most_stages: Length at most.
        to_output: Whether the output may have storages of earlier states.
    """
    n = draw(st.integers(1, most_stages))
    size, links = draw(SMALL), []
    gradients = [draw(SMALL) for _ in range(n + 1)]
    state = [size, *[0] * draw(st.integers(0, 1))]
    for i in range(1, n + 1):
        ledger = draw(_parted(len(state), last=i == n and not to_output))
        state = _handed_on(state, ledger)
        links.append(_parted_stage(draw, ledger, sum(state), (gradients[i - 1], gradients[i])))
    return Chain(
        stages=tuple(links),
        input_bytes=size,
        input_gradient_bytes=gradients[0],
        loss_seconds=draw(SECONDS),
        loss_overhead_bytes=draw(SMALL),
        held_bytes=sum(state) + draw(SMALL),
    )


@st.composite
def parted_runs(draw: st.DrawFn) -> Chain:
    """Such a chain in which stages are repeated, and may hand on what was there before."""
    size, gradient, links = draw(SMALL), draw(SMALL), []
    state = [size, *[0] * draw(st.integers(0, 1))]
    for _ in range(draw(st.integers(1, 3))):
        ledger = draw(_parted(len(state), equal=draw(st.integers(0, 3)) > 0))
        parts = ledger.parts
        assert parts is not None
        times = draw(st.integers(4, 8)) if parts.inputs == len(parts.output_sources) else 1
        # Alike but for what is handed on from further and further back.
        stage = replace(
            _parted_stage(draw, ledger, sum(state) + ledger.state_bytes, (gradient, gradient)),
            parameter_gradient_bytes=0,
        )
        for _ in range(times):
            state = _handed_on(state, ledger)
            links.append(stage)
    return Chain(
        stages=tuple(links),
        input_bytes=size,
        input_gradient_bytes=gradient,
        held_bytes=sum(state),
    )
