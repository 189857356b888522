"""Schedules on graphs: the rules written apart, bytes by hand, every rule, every mutation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsched.base.budget import Link, Tier
from ckptsched.base.errors import InvalidScheduleError, WorkloadError
from ckptsched.schedule.language import Operation, Schedule
from ckptsched.schedule.trace import Live, Trace
from ckptsched.simulator.simulator import simulate
from ckptsched.solvers.graph.to_schedule import on_demand_runs, store_all_runs, with_drops
from ckptsched.workload.chain import Chain
from ckptsched.workload.graph import Graph
from ckptsched.workload.stage import Stage
from tests.oracles.brute_force import persistent_schedules
from tests.oracles.graph_rules import simulate_graph
from tests.support import random_schedules
from tests.support.graphs import graphs, residual, two_branches, u_net
from tests.support.shared_chains import example
from tests.support.strategies import chains

WORDS = (
    "F1 F2 F3 F4 T1 T2.1 T2 T3 T4 turn B1 B2 B3 B4 -x0 -x1 -x2 -t1 -t2 -g0 -g1 -g2 "
    "x1:device>host -x1@host x1:host>device g1:device>host g1:host>device -g1@host"
)


def diamond() -> Graph:
    """a feeds b and c, which d adds up; sizes tell what is there."""

    def stage(name: str, size: int, parameters: int = 0) -> Stage:
        return Stage(
            name=name,
            forward_seconds=1.0,
            backward_seconds=2.0,
            state_bytes=size,
            tape_bytes=3 * size,
            gradient_bytes=2 * size,
            forward_overhead_bytes=1,
            backward_overhead_bytes=2,
            parameter_gradient_bytes=parameters,
        )

    return Graph(
        stages=(stage("a", 10), stage("b", 100, parameters=7), stage("c", 1000), stage("d", 10000)),
        reads=((0,), (1,), (1,), (2, 3)),
        input_bytes=5,
        input_gradient_bytes=6,
        loss_seconds=3.0,
        loss_overhead_bytes=4,
        held_bytes=100000,
    )


def run(graph: Graph, text: str) -> Trace:
    """Simulate a schedule written as words with names."""
    return simulate(graph, graph.parse_schedule(text))


LINKS = {(Tier.DEVICE, Tier.HOST): Link(10.0), (Tier.HOST, Tier.DEVICE): Link(20.0, 1.0)}


def judged(judge: Callable[[], Trace]) -> object:
    """All that a simulation says."""
    try:
        trace = judge()
    except InvalidScheduleError as error:
        return error.position, error.operation, error.reason
    return trace, trace.timeline.tolist(), trace.live_at_peak


def alike(chain: Chain, schedule: Schedule) -> bool:
    """Whether a chain is judged as the path that it is, by the rules written apart."""
    graph = Graph.from_chain(chain)
    found = judged(lambda: simulate(chain, schedule, links=LINKS))
    apart = judged(lambda: simulate_graph(graph, schedule, LINKS))
    return bool(without_names(found) == without_names(apart))


def without_names(found: object) -> object:
    """What is said of a chain and of a graph alike."""
    match found:
        case (Trace() as trace, timeline, live):
            return replace(trace, peak_operation=""), timeline, sorted(x.bytes for x in live)
        case (position, _, _):
            return position
    raise AssertionError(found)


@settings(max_examples=60, deadline=None)
@given(chains(most_stages=4))
def test_a_chain_is_a_path_for_all_persistent_schedules(chain: Chain) -> None:
    assert all(alike(chain, schedule) for schedule in persistent_schedules(len(chain))[:60])


@settings(max_examples=60, deadline=None)
@given(st.data(), chains(most_stages=4))
def test_a_chain_is_a_path_for_any_schedule(data: st.DataObject, chain: Chain) -> None:
    schedule = data.draw(random_schedules.schedules(len(chain)))
    assert alike(chain, schedule)
    gone = data.draw(st.integers(0, len(schedule) - 1))
    assert alike(chain, Schedule.of(x for k, x in enumerate(schedule) if k != gone))


@settings(max_examples=300, deadline=None)
@given(
    chains(most_stages=4),
    st.integers(0, 10**6),
    st.lists(st.sampled_from(WORDS.split()), max_size=3),
    st.data(),
)
def test_a_chain_is_a_path_for_broken_schedules_and_other_tiers(
    chain: Chain, pick: int, words: list[str], data: st.DataObject
) -> None:
    known = persistent_schedules(len(chain))
    assert alike(chain, broken(known[pick % len(known)], words, data))


def broken(schedule: Schedule, words: list[str], data: st.DataObject) -> Schedule:
    """The schedule with words put in anywhere, and one word left out."""
    text = schedule.to_text().split()
    for word in words:
        text.insert(data.draw(st.integers(0, len(text))), word)
    if data.draw(st.booleans()):
        del text[data.draw(st.integers(0, len(text) - 1))]
    return Schedule.from_text(" ".join(text))


@settings(max_examples=400, deadline=None)
@given(graphs(most_nodes=5), st.lists(st.sampled_from(WORDS.split()), max_size=3), st.data())
def test_graphs_are_judged_by_the_rules_written_apart(
    graph: Graph, words: list[str], data: st.DataObject
) -> None:
    schedule = broken(data.draw(st.sampled_from([*schedules(graph)])), words, data)
    found = judged(lambda: simulate(graph, schedule, links=LINKS))
    assert found == judged(lambda: simulate_graph(graph, schedule, LINKS))


def test_worked_examples() -> None:
    graph = Graph.from_chain(example("E1"))
    trace = simulate(graph, Schedule.from_text("F1 T2 turn B2 -x1 T1 B1 -x0"))
    assert trace.timeline.tolist() == [2, 5, 6, 7, 3, 5, 6, 2]
    assert (trace.seconds, trace.peak_operation) == (7, "B:stage%202")


STORE_ALL = "T:a T:b T:c T:d turn B:d B:c B:b B:a -x:input"


def test_bytes_of_a_diamond_by_hand() -> None:
    trace = run(diamond(), STORE_ALL)
    tapes, base = 3 * 11110, 100005
    levels = [base + 30 + 1, base + 330 + 1, base + 3330 + 1, base + tapes + 1]
    level = base + tapes + 20000  # and the gradient of d
    levels.append(level + 4)
    # d makes the gradients of b and c; c makes that of a, to which b adds what it makes.
    levels.append(level + 200 + 2000 + 2)
    level += 200 + 2000 - 20000 - 30000
    levels.append(level + 20 + 2)
    level += 20 - 2000 - 3000
    levels.append(level + 20 + 2 + 7)
    level += 7 - 200 - 300
    levels.append(level + 6 + 2)
    level += 6 - 20 - 30
    levels.append(level)
    assert trace.timeline.tolist() == levels
    assert level == base + 6 + 7
    assert (trace.seconds, trace.forwards) == (4 + 8 + 3, 4)
    assert (trace.peak_operation, trace.ledger_peak_bytes) == ("B:d", None)
    assert trace.live_at_peak == (
        Live("output held by the caller", 100000),
        Live("tape[d]", 30000),
        Live("grad[d]", 20000),
        Live("tape[c]", 3000),
        Live("the operation itself", 2202),
        Live("tape[b]", 300),
        Live("tape[a]", 30),
        Live("state[input]", 5),
    )


def test_backwards_may_come_in_another_order() -> None:
    trace = run(diamond(), "T:a T:b T:c T:d turn B:d B:b B:c B:a -x:input")
    assert trace.seconds == 15


@pytest.mark.parametrize(
    ("text", "position", "reason"),
    [
        ("T:b", 0, "state[a] is not available: neither it nor tape[a] is stored"),
        ("F:a F:a", 1, "state[a] is already stored"),
        ("F:a F:b T:d", 2, "state[c] is not available"),
        ("F:a turn", 1, "state[d] is not available for the loss"),
        ("T:a T:b T:c T:d turn turn", 5, "the forward pass was ended before"),
        ("T:a T:b T:c T:d B:d", 4, "the forward pass has not ended: Turn comes first"),
        ("T:a T:b T:c T:d turn B:b", 5, "grad[b] is not complete: node 'd' comes first"),
        ("T:a T:b T:c T:d turn B:d B:c B:a", 7, "grad[a] is not complete: node 'b' comes first"),
        ("T:a T:b T:c T:d turn B:d B:d", 6, "node 'd' has had its backward"),
        ("T:a T:b T:c F:d turn B:d", 5, "tape[d] is not stored"),
        ("F:a T:b -x:a", 2, "tape[b] holds state[a], which this would forget"),
        ("T:a F:b T:c -t:a", 3, "tape[c] holds state[a], which this would forget"),
        (
            "F:a T:b F:c T:a -x:a",
            4,
            "tape[b] holds state[a], which this would forget: it was made from state[a] and keeps "
            "that copy, which can go after B:b or -t:b only",
        ),
        ("T:a T:b F:a F:c -t:a", 4, "tape[b] holds state[a], which this would forget: it was made"),
        ("F:a T:b t:b:device>host -t:b -x:a t:b:host>device", 5, "tape[b] holds state[a], which"),
        ("-x:c", 0, "state[c] is not stored"),
        ("F:a -x:input", 1, "the input is needed until B:a"),
        ("T:a T:b T:c T:d turn -g:d B:d", 6, "grad[d] is not stored"),
        (
            "T:a T:b T:c T:d turn B:d B:c -g:a B:b",
            8,
            "grad[a] was begun and is not stored: its first part would be lost",
        ),
        (
            "T:a T:b T:c T:d turn B:d B:c g:a:device>host B:b",
            8,
            "the copy of grad[a] on the host would no longer be what it is",
        ),
        ("F:a x:a:device>device", 1, "source and target are the same tier"),
        ("F:a x:a:host>device", 1, "state[a] is not stored on the host"),
        ("F:a x:a:device>host x:a:host>device", 2, "state[a] is already stored on the device"),
        ("F:a -x:a@disk", 1, "state[a] is not stored on the disk"),
    ],
)
def test_every_rule_has_its_message(text: str, position: int, reason: str) -> None:
    with pytest.raises(InvalidScheduleError) as caught:
        run(diamond(), text)
    error = caught.value
    assert (error.position, error.operation) == (position, text.split()[position])
    assert error.reason.startswith(reason)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Turn is missing"),
        ("T:a T:b T:c T:d turn B:d", "node 'c' never had its backward"),
        (STORE_ALL.removesuffix(" -x:input"), "state[input] is still stored: it leaks"),
        (STORE_ALL + " -g:input", "grad[input] is not stored: it is the result"),
        ("T:a x:a:device>host" + STORE_ALL.removeprefix("T:a"), "state[a] is not stored"),
    ],
)
def test_schedules_that_end_early_or_leak(text: str, reason: str) -> None:
    with pytest.raises(InvalidScheduleError) as caught:
        run(diamond(), text)
    assert reason in caught.value.reason


def test_a_node_has_one_tape() -> None:
    with pytest.raises(InvalidScheduleError, match="node 'a' offers no tape 1, the last is 0"):
        simulate(diamond(), Schedule.from_text("T1.1"))


def test_numbers_that_are_none() -> None:
    for text in ("F5", "F0", "T5", "B5", "B0", "-x5", "x5:device>host"):
        with pytest.raises(InvalidScheduleError, match="the graph has nodes 1 to 4"):
            simulate(diamond(), Schedule.from_text(text))


def test_a_gradient_may_wait_on_the_host() -> None:
    text = (
        "T:a T:b T:c T:d turn B:d g:b:device>host -g:b B:c g:b:host>device -g:b@host B:b B:a "
        "-x:input"
    )
    trace = run(diamond(), text)
    assert trace.host_peak_bytes == 200


def test_graphs_have_no_ledger() -> None:
    with pytest.raises(WorkloadError, match="no exact bytes"):
        simulate(diamond(), diamond().parse_schedule(STORE_ALL), model="ledger")
    plain = simulate(diamond(), diamond().parse_schedule(STORE_ALL), model="planning")
    assert plain == run(diamond(), STORE_ALL)


def schedules(graph: Graph) -> Iterator[Schedule]:
    """Schedules that keep all, some and none."""
    yield with_drops(graph, store_all_runs(graph))
    for step in (1, 2, 3, len(graph) + 1):
        yield with_drops(graph, on_demand_runs(graph, range(step, len(graph) + 1, step)))


@settings(max_examples=40, deadline=None)
@given(graphs(most_nodes=6))
def test_live_values_add_up_to_the_peak(graph: Graph) -> None:
    for schedule in schedules(graph):
        trace = simulate(graph, schedule)
        assert sum(item.bytes for item in trace.live_at_peak) == trace.peak_bytes
        assert trace.timeline.max() == trace.timeline[trace.peak_position] == trace.peak_bytes


@settings(max_examples=25, deadline=None)
@given(graphs(most_nodes=5))
def test_no_operation_can_be_left_out_or_doubled(graph: Graph) -> None:
    for schedule in schedules(graph):
        operations = list(schedule)
        for mutant in mutants(operations):
            with pytest.raises(InvalidScheduleError):
                simulate(graph, Schedule.of(mutant))


@pytest.mark.parametrize("graph", [residual(), u_net(), two_branches()])
def test_no_operation_of_a_network_can_be_left_out_or_doubled(graph: Graph) -> None:
    for schedule in schedules(graph):
        simulate(graph, schedule)
        for mutant in mutants(list(schedule)):
            with pytest.raises(InvalidScheduleError):
                simulate(graph, Schedule.of(mutant))


def mutants(operations: list[Operation]) -> Iterator[list[Operation]]:
    """Each operation left out, and doubled."""
    for k in range(len(operations)):
        yield operations[:k] + operations[k + 1 :]
        yield operations[: k + 1] + operations[k:]


@settings(max_examples=40, deadline=None)
@given(graphs(most_nodes=6))
def test_keeping_more_takes_less_time(graph: Graph) -> None:
    kept = [on_demand_runs(graph, range(first, len(graph) + 1)) for first in range(1, 8)]
    seconds = [simulate(graph, with_drops(graph, runs)).seconds for runs in kept]
    everything = simulate(graph, with_drops(graph, store_all_runs(graph))).seconds
    assert all(a <= b for a, b in pairwise([everything, *seconds]))
    assert everything == graph.store_all_seconds
