"""Graphs: checks, numbering, networkx, chains, JSON, schedules by name."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsched.base.budget import Tier
from ckptsched.base.errors import InvalidScheduleError, WorkloadError
from ckptsched.schedule.language import Copy, Drop, Forward, Kind, Schedule, Value
from ckptsched.workload.graph import Graph
from ckptsched.workload.stage import Stage, TapeOption
from tests.support.graphs import graphs, named, residual, two_branches, u_net
from tests.support.shared_chains import exact_stage, example, uniform
from tests.support.small_chains import mixed_chain, random_chains
from tests.support.strategies import chains

STAGE = Stage(
    name="v",
    forward_seconds=1.0,
    backward_seconds=2.0,
    state_bytes=1,
    tape_bytes=2,
    gradient_bytes=1,
)


def graph_of(*edges: tuple[str, str], **figures: Any) -> nx.DiGraph:
    """A graph of networkx by its edges from "input" on."""
    graph: nx.DiGraph = nx.DiGraph(**figures)
    graph.add_node("input")
    graph.add_edges_from(edges)
    for node in graph:
        if node != "input":
            graph.nodes[node]["stage"] = STAGE
    return graph


@settings(max_examples=60, deadline=None)
@given(graphs(most_nodes=6))
def test_round_trips(graph: Graph) -> None:
    again = Graph.from_json(json.loads(json.dumps(graph.to_json())))
    assert again == graph
    assert again.fingerprint == graph.fingerprint
    assert Graph.from_networkx(graph.to_networkx()) == graph


def test_files(tmp_path: Path) -> None:
    graph = u_net()
    graph.save(tmp_path / "graph.json")
    assert Graph.load(tmp_path / "graph.json") == graph
    (tmp_path / "list.json").write_text("[]")
    for name in ("none.json", "list.json"):
        with pytest.raises(WorkloadError, match=name):
            Graph.load(tmp_path / name)


def test_the_name_is_no_part_of_the_fingerprint() -> None:
    graph = two_branches()
    assert replace(graph, name="other").fingerprint == graph.fingerprint
    assert replace(graph, held_bytes=1).fingerprint != graph.fingerprint


def test_nodes_are_numbered_as_they_were_added_where_edges_allow() -> None:
    found = graph_of(("input", "b"), ("b", "c"), ("a", "c"), ("input", "a"), ("c", "d"))
    graph = Graph.from_networkx(found)
    # "a" comes after "c" in the order of adding, and must come before it.
    assert graph.names == ("input", "b", "a", "c", "d")
    assert graph.reads == ((0,), (0,), (1, 2), (3,))
    assert graph.readers == ((1, 2), (3,), (3,), (4,), ())
    assert [graph.stage_name(i) for i in (0, 4)] == ["input", "d"]
    assert graph.numbers["c"] == 3
    assert graph.store_all_seconds == 12.0
    assert not graph.is_path
    with pytest.raises(FrozenInstanceError):
        graph.name = "x"  # type: ignore[misc]


@settings(max_examples=60, deadline=None)
@given(st.one_of(chains(), random_chains()))
def test_chains_are_paths(chain: Any) -> None:
    graph = Graph.from_chain(chain)
    assert graph.is_path
    assert len(graph) == len(chain)
    assert graph.store_all_seconds == chain.store_all_seconds
    back = graph.to_chain()
    names = [stage.name for stage in chain.stages]
    assert [named(s, n) for s, n in zip(back.stages, names, strict=True)] == list(chain.stages)
    assert replace(back, stages=chain.stages) == chain
    assert Graph.from_chain(back) == graph


def test_names_of_a_chain_are_made_distinct() -> None:
    assert Graph.from_chain(uniform(2)).names == ("input", "stage 1", "stage 2")
    assert Graph.from_chain(mixed_chain()).names[4:6] == ("block0.step[3]", "block1.step[0]")
    same = replace(uniform(2), stages=(named(STAGE, "input"), named(STAGE, "input")))
    assert Graph.from_chain(same).names == ("input", "input#1", "input#2")
    one = replace(uniform(1), stages=(named(STAGE, "input"),))
    assert Graph.from_chain(one).names == ("input_", "input")


def test_exact_bytes_stay_with_the_chain() -> None:
    chain = replace(uniform(1), stages=(exact_stage(),))
    graph = Graph.from_chain(chain)
    assert chain.has_ledger
    assert not graph.has_ledger
    with pytest.raises(WorkloadError, match="has a ledger"):
        replace(graph, stages=(replace(exact_stage(), name="v"),))


def test_nodes_have_one_tape() -> None:
    other = TapeOption(tape_bytes=1, forward_seconds=2.0, backward_seconds=2.0)
    chain = replace(uniform(1), stages=(replace(STAGE, other_tapes=(other,)),))
    with pytest.raises(WorkloadError, match="node 'v' offers 2 tapes: in a graph each node has"):
        Graph.from_chain(chain)


def test_only_a_path_is_a_chain() -> None:
    with pytest.raises(WorkloadError, match=r"node 'b0\.add' reads 'input', 'b0\.conv2', not"):
        residual().to_chain()


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([("input", "a"), ("a", "b"), ("b", "c"), ("c", "a")], "cycle: a -> b -> c -> a"),
        ([("input", "a"), ("a", "a")], "cycle: a -> a"),
        ([("input", "a"), ("input", "b")], "2 nodes are read by no other: 'a', 'b'"),
        ([("input", "a"), ("b", "a")], "node 'b' reads nothing: let it read 'input'"),
        ([("a", "input"), ("input", "b")], "'input' reads 'a', and has no attribute 'stage'"),
        ([], "at least one node"),
    ],
)
def test_impossible_graphs(edges: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        Graph.from_networkx(graph_of(*edges))


def test_impossible_attributes() -> None:
    bare = graph_of(("input", "a"), ("a", "b"))
    del bare.nodes["a"]["stage"]
    with pytest.raises(WorkloadError, match="without one: 'input', 'a'"):
        Graph.from_networkx(bare)
    bare.nodes["a"]["stage"] = 7
    with pytest.raises(WorkloadError, match="'stage' of node 'a' must be a Stage, found 7"):
        Graph.from_networkx(bare)
    bare.nodes["a"]["stage"] = bare.nodes["input"]["stage"] = STAGE
    with pytest.raises(WorkloadError, match="without one: none"):
        Graph.from_networkx(bare)
    with pytest.raises(WorkloadError, match="attribute 'input_size'; those that count are input_b"):
        Graph.from_networkx(graph_of(("input", "a"), input_size=1))
    for wrong in (nx.MultiDiGraph(), nx.Graph(), {}):
        with pytest.raises(WorkloadError, match=r"a networkx\.DiGraph is needed"):
            Graph.from_networkx(wrong)
    numbers = nx.relabel_nodes(graph_of(("input", "a")), {"a": 1})
    with pytest.raises(WorkloadError, match="node 1 needs a name, found 1"):
        Graph.from_networkx(numbers)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("forward_seconds", float("nan")),
        ("forward_seconds", -1.0),
        ("backward_seconds", float("inf")),
        ("state_bytes", -1),
        ("state_bytes", 1.5),
        ("tape_bytes", 0),
        ("gradient_bytes", True),
    ],
)
def test_impossible_stages(field: str, value: Any) -> None:
    graph = residual()
    stages = (*graph.stages[:-1], replace(graph.stages[-1], **{field: value}))
    with pytest.raises(WorkloadError, match="node 'head'"):
        replace(graph, stages=stages)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_bytes": -1}, "input_bytes must be a whole number"),
        ({"loss_seconds": float("nan")}, "the loss must take 0 seconds or more"),
        ({"input_name": "join"}, "two nodes are called 'join'"),
        ({"input_name": ""}, "node 0 needs a name"),
        ({"reads": ((0.0,), *((i,) for i in range(1, 8)))}, "must read nodes before it"),
        ({"reads": (("0",), *((i,) for i in range(1, 8)))}, "must read nodes before it"),
        ({"reads": ((0,),)}, "8 nodes need as many tuples of reads, found 1"),
        ({"reads": ((0,), (2,), *((i,) for i in range(2, 8)))}, "must read nodes before it"),
        ({"reads": ((0,), (1, 1), *((i,) for i in range(2, 8)))}, "each once and ascending"),
        ({"reads": ((0,), (-1,), *((i,) for i in range(2, 8)))}, "from 0 to 1; found"),
    ],
)
def test_impossible_figures(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        replace(two_branches(), **changes)


def test_damaged_json() -> None:
    good = two_branches().to_json()
    for change, message in (
        ({"input": None}, "this is not a graph"),
        ({"nodes": [{"name": "a"}]}, "KeyError: 'u_f'"),
        ({"nodes": list(reversed(good["nodes"]))}, "no input and no node before it"),
        ({"size_unit": "MiB"}, "size_unit of a graph is 'bytes', found 'MiB'"),
    ):
        with pytest.raises(WorkloadError, match=message):
            Graph.from_json(good | change)


def test_schedules_by_name() -> None:
    graph = Graph.from_networkx(graph_of(("input", "a"), ("a", "conv 1%")))
    schedule = Schedule.from_text("F1 T2 turn B2 -x1 T1 B1 -x0 -g1@disk x1:device>host")
    text = graph.schedule_text(schedule)
    assert text == (
        "F:a T:conv%201%25 turn B:conv%201%25 -x:a T:a B:a -x:input -g:a@disk x:a:device>host"
    )
    assert graph.parse_schedule(text) == schedule


@pytest.mark.parametrize(
    ("text", "position", "reason"),
    [
        ("F:v1 F:v9", 1, "no node is called 'v9'"),
        ("F1", 0, "this is no operation"),
        ("turn nonsense", 1, "this is no operation"),
        ("x:v1:device>moon", 0, "this is no operation"),
        ("F:v1@host", 0, "this is no operation"),
    ],
)
def test_words_that_are_none(text: str, position: int, reason: str) -> None:
    graph = Graph.from_chain(example("E1"))
    graph = replace(graph, stages=tuple(named(s, f"v{i}") for i, s in enumerate(graph.stages, 1)))
    with pytest.raises(InvalidScheduleError) as caught:
        graph.parse_schedule(text)
    assert (caught.value.position, caught.value.reason) == (position, reason)


@settings(max_examples=60, deadline=None)
@given(graphs(), st.data())
def test_words_round_trip(graph: Graph, data: st.DataObject) -> None:
    name = data.draw(st.text(min_size=1, max_size=6))
    names = [stage.name for stage in graph.stages]
    if name in (*names, graph.input_name):
        return
    graph = replace(graph, stages=(replace(graph.stages[0], name=name), *graph.stages[1:]))
    value = Value(Kind.STATE, 1)
    operations = [Forward(1), Forward(1, tape=True), Drop(value), Drop(value, Tier.HOST)]
    operations.append(Copy(Value(Kind.GRAD, 0), Tier.HOST, Tier.DEVICE))
    schedule = Schedule.of(operations)
    assert graph.parse_schedule(graph.schedule_text(schedule)) == schedule
