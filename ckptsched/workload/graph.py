"""What is planned where stages do not stand in a row: a directed acyclic graph, and its JSON.

A node is a stage that reads one or more states and makes one. The rules of schedules are those
of the chain, with "the state before" read as "every state that the node reads"
(`docs/concepts/graphs.md`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, final
from urllib.parse import quote, unquote

from ..base.errors import InvalidScheduleError, WorkloadError
from ..base.json_files import printable
from ..schedule.language import Operation, Schedule, format_operation, parse_operation
from .chain import Chain, ChainArrays
from .saved import FIGURES, Saved
from .stage import Block, Signature, Stage, check_stage
from .stage_json import COLUMNS, figures_of
from .tables import chain_html
from .values import narrowed

if TYPE_CHECKING:
    import networkx as nx

# networkx is imported where it is needed: it takes longer than most plans.

INPUT = "input"
"""What the input is called where nothing else is said."""

_NUMBERED = re.compile(r"(-?[FTBxtg])([0-9]+)(.*)")
_NAMED = re.compile(r"(-?[FTBxtg]):([^:@>]+)(.*)")


@final
@dataclass(frozen=True, kw_only=True)
class Graph(Saved):
    """Stages that read each other's states, an input and a loss.

    Nodes are counted from 1 to n in topological order; 0 is the input. One input stands for all
    that a batch holds; the loss sees the state of node n, which alone is read by no other.
    Nodes are called by the names of their stages, which are distinct.
    """

    reads: tuple[tuple[int, ...], ...]
    """The numbers of the states that each node reads, ascending, each below the node's own."""
    input_name: str = INPUT
    """What the input is called."""
    lined: Chain | None = None
    """The chain of live sets of a recorded model, which this is the graph of (see `of_values`): its
    exact bytes hold for the graph, and models are run by plans of the graph, too."""

    kind: ClassVar[str] = "graph"
    needs: ClassVar[str] = "an input, and nodes with name, reads, " + ", ".join(
        key for key, _, _ in COLUMNS
    )
    is_uniform: ClassVar[bool] = False
    """Closed forms for equal stages are for chains."""

    def __post_init__(self) -> None:
        """Refuse names, edges, sizes and times that are out of range, by a WorkloadError."""
        if not self.stages:
            raise WorkloadError("a graph needs at least one node besides its input, found none")
        self._check_whole()
        _check_names((self.input_name, *(stage.name for stage in self.stages)))
        for stage in self.stages:
            check_stage(f"node {stage.name!r}", stage)
            if stage.ledger is not None and self.lined is None:
                raise WorkloadError(f"node {stage.name!r} has a ledger: graphs have none")
            if stage.other_tapes and self.lined is None:
                raise WorkloadError(
                    f"node {stage.name!r} offers {len(stage.tapes)} tapes: in a graph each node "
                    "has one"
                )
            if stage.once:
                raise WorkloadError(
                    f"node {stage.name!r} is to run once: in a graph any node may run again"
                )
        _check_reads(self)

    @property
    def has_ledger(self) -> bool:
        """Whether exact bytes are known: of a recorded model they are."""
        return self.lined is not None

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Those of the recorded model; other graphs have none."""
        return () if self.lined is None else self.lined.blocks

    @property
    def signature(self) -> Signature | None:
        """What a model must match to be run by a plan: of a recorded one there is such."""
        return None if self.lined is None else self.lined.signature

    @functools.cached_property
    def offers_tapes(self) -> bool:
        """Whether some node can be taped in more than one way."""
        return any(stage.other_tapes for stage in self.stages)

    @functools.cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """The nodes that read each state, ascending; index 0 is the input."""
        found: list[list[int]] = [[] for _ in range(len(self) + 1)]
        for i, sources in enumerate(self.reads, 1):
            for source in sources:
                found[source].append(i)
        return tuple(map(tuple, found))

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """What nodes are called; index 0 is the input."""
        return (self.input_name, *(stage.name for stage in self.stages))

    @functools.cached_property
    def numbers(self) -> Mapping[str, int]:
        """The number of each name."""
        return {name: i for i, name in enumerate(self.names)}

    @functools.cached_property
    def arrays(self) -> ChainArrays:
        """The planning model in columns; index i is node i, index 0 the input."""
        return self.in_a_row.arrays

    @functools.cached_property
    def store_all_seconds(self) -> float:
        """Seconds of the step when nothing is run twice."""
        return self.in_a_row.store_all_seconds

    @functools.cached_property
    def is_path(self) -> bool:
        """Whether every node reads the one before it and no other."""
        return all(sources == (i,) for i, sources in enumerate(self.reads))

    @functools.cached_property
    def in_a_row(self) -> Chain:
        """The same figures as a chain; what sums them up does not ask who reads what."""
        figures: dict[str, Any] = {figure: getattr(self, figure) for figure in FIGURES}
        return Chain(stages=self.stages, **figures)

    def stage_name(self, i: int) -> str:
        """Name of node i for people."""
        return self.names[i]

    def _repr_html_(self) -> str:
        """For notebooks: a table of the nodes."""
        return chain_html(self, f"graph {printable(self.name)} of {len(self)} nodes")

    # ---- chains and networkx ------------------------------------------------------------

    @classmethod
    def of_values(cls, chain: Chain) -> Graph:
        """The graph of a recorded model: each stage reads what it needs, not the whole live set.

        Args:
            chain: A chain that `profile` made of a recorded model.

        Returns:
            A graph with the same stages in the same order, and the exact bytes of the chain.

        Raises:
            WorkloadError: It is not known what its stages read, or some are to run once.
        """
        if not chain.values or not chain.has_ledger:
            raise WorkloadError(
                "a graph is made of a chain that was profiled from a recorded model, and of this "
                "one it is not known what each stage reads"
            )
        if any(stage.once for stage in chain.stages):
            raise WorkloadError("a graph has no stages that run once, and this chain has some")
        n = len(chain)
        reads = [set(each.makers) for each in chain.values]
        read = set().union(*reads)
        reads[-1] |= {i for i in range(1, n) if i not in read}  # which run for what they do besides
        figures: dict[str, Any] = {figure: getattr(chain, figure) for figure in FIGURES}
        return cls(
            stages=tuple(_node(chain, i) for i in range(1, n + 1)),
            reads=tuple(tuple(sorted(sources)) for sources in reads),
            input_name=_unused(INPUT, [chain.stage_name(i) for i in range(1, n + 1)]),
            lined=chain,
            **figures,
        )

    @classmethod
    def from_chain(cls, chain: Chain) -> Graph:
        """A chain as a path.

        Args:
            chain: Any chain. Exact bytes, blocks and the signature are left behind: the graph
                has the planning model's figures, which bound the exact bytes.

        Returns:
            A graph on which every schedule has the same trace as on the chain, in the
            planning model.

        Raises:
            WorkloadError: A stage offers several tapes.
        """
        names = [chain.stage_name(i) for i in range(1, len(chain) + 1)]
        if len(set(names)) < len(names):
            names = [f"{name}#{i}" for i, name in enumerate(names, 1)]
        entry = _unused(INPUT, names)
        stages = zip(chain.stages, names, strict=True)
        figures: dict[str, Any] = {figure: getattr(chain, figure) for figure in FIGURES}
        return cls(
            stages=tuple(replace(stage, name=name, ledger=None) for stage, name in stages),
            reads=tuple((i,) for i in range(len(chain))),
            input_name=entry,
            **figures,
        )

    def to_chain(self) -> Chain:
        """The path as a chain.

        Raises:
            WorkloadError: A node reads something else than the node before it.
        """
        for i, sources in enumerate(self.reads, 1):
            if sources != (i - 1,):
                read = ", ".join(repr(self.names[source]) for source in sources)
                raise WorkloadError(
                    f"only a path is a chain: node {self.names[i]!r} reads {read}, not "
                    f"{self.names[i - 1]!r} alone"
                )
        return self.in_a_row

    @classmethod
    def from_networkx(cls, graph: nx.DiGraph[str]) -> Graph:
        """Take a graph of networkx; an edge leads from what is read to its reader.

        Args:
            graph: A node is a name with the attribute `stage`, a `Stage`; its name there does
                not count. One node has none: the input. Figures of the whole are attributes of
                the graph, such as `nx.DiGraph(loss_seconds=0.1, input_bytes=4096)`. Nodes are
                numbered in the order in which they were added as far as edges allow.

        Raises:
            WorkloadError: A cycle, several inputs or sinks, nodes that read nothing, attributes
                that are missing or unknown, impossible values.
        """
        import networkx as nx

        if not isinstance(graph, nx.DiGraph) or graph.is_multigraph():
            raise WorkloadError(f"a networkx.DiGraph is needed, found {type(graph).__name__}")
        unknown = sorted(set(graph.graph) - set(FIGURES), key=str)
        if unknown:
            raise WorkloadError(
                f"the graph has the attribute {unknown[0]!r}; those that count are "
                + ", ".join(FIGURES)
            )
        return cls(**_structure(graph), **graph.graph)

    def to_networkx(self) -> nx.DiGraph[str]:
        """A graph of networkx that `from_networkx` reads back."""
        import networkx as nx

        figures: dict[str, Any] = {figure: getattr(self, figure) for figure in FIGURES}
        graph: nx.DiGraph[str] = nx.DiGraph(**figures)
        graph.add_node(self.input_name)
        for stage, sources in zip(self.stages, self.reads, strict=True):
            graph.add_node(stage.name, stage=stage)
            graph.add_edges_from((self.names[source], stage.name) for source in sources)
        return graph

    # ---- schedules by name --------------------------------------------------------------

    def operation_text(self, operation: Operation) -> str:
        """One word, such as F:conv1, T:conv1 (with tape), turn, B:conv1, -x:conv1."""
        word = format_operation(operation)
        match = _NUMBERED.fullmatch(word)
        if match is None or int(match[2]) > len(self):
            return word
        return f"{match[1]}:{_quoted(self.names[int(match[2])])}{match[3]}"

    def schedule_text(self, schedule: Schedule) -> str:
        """The schedule as words with names, that `parse_schedule` reads back."""
        return " ".join(map(self.operation_text, schedule))

    def parse_schedule(self, text: str) -> Schedule:
        """Read what `schedule_text` wrote.

        Raises:
            InvalidScheduleError: A word that is no operation, or names no node.
        """
        return Schedule.of(self._parse(word, i) for i, word in enumerate(text.split()))

    def _parse(self, word: str, position: int) -> Operation:
        match = _NAMED.fullmatch(word)
        if match is None:
            if word != "turn":
                raise InvalidScheduleError(position, repr(word[:80]), "this is no operation")
            return parse_operation(word)
        number = self.numbers.get(unquote(match[2]))
        if number is None:
            reason = f"no node is called {unquote(match[2])!r}"
            raise InvalidScheduleError(position, repr(word[:80]), reason)
        return parse_operation(f"{match[1]}{number}{match[3]}", position)

    # ---- JSON ---------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The graph as JSON data, in bytes and seconds; that of a recorded model as its chain."""
        if self.lined is not None:
            return {"name": self.name, "lined": self.lined.to_json()}
        nodes = []
        for stage, sources in zip(self.stages, self.reads, strict=True):
            reads = [self.names[source] for source in sources]
            nodes.append({"name": stage.name, "reads": reads, **figures_of(stage)})
        entry = {
            "name": self.input_name,
            "w_a": self.input_bytes,
            "w_g": self.input_gradient_bytes,
        }
        return {
            "name": self.name,
            "size_unit": "bytes",
            "time_unit": "s",
            "input": entry,
            "nodes": nodes,
            "u_loss": float(self.loss_seconds),
            "o_loss": self.loss_overhead_bytes,
            "w_held": self.held_bytes,
        }

    @classmethod
    def _read(cls, data: Mapping[str, Any]) -> Self:
        if "lined" in data:
            made = cls.of_values(Chain.from_json(data["lined"]))
            return replace(made, name=data.get("name", ""))
        for key, unit in (("size_unit", "bytes"), ("time_unit", "s")):
            if data.get(key, unit) != unit:
                raise WorkloadError(f"{key} of a graph is {unit!r}, found {data[key]!r}")
        entry, nodes = data["input"], data["nodes"]
        number = {entry["name"]: 0}
        stages, reads = [], []
        for i, node in enumerate(nodes, 1):
            figures: dict[str, Any] = {attribute: node[key] for key, attribute, _ in COLUMNS}
            stages.append(Stage(name=node["name"], **figures))
            reads.append(tuple(sorted(_number_of(number, node))))
            number[node["name"]] = i
        return cls(
            stages=tuple(stages),
            reads=tuple(reads),
            input_name=entry["name"],
            input_bytes=entry["w_a"],
            input_gradient_bytes=entry["w_g"],
            loss_seconds=data.get("u_loss", 0.0),
            loss_overhead_bytes=data.get("o_loss", 0),
            held_bytes=data.get("w_held", 0),
            name=data.get("name", ""),
        )


def _unused(name: str, names: Sequence[str]) -> str:
    """A name that is not among others."""
    while name in names:
        name += "_"
    return name


def _node(chain: Chain, i: int) -> Stage:
    """Stage i by what it makes itself: figures of the planning model, for rules and for people."""
    stage, values = chain.stages[i - 1], chain.values[i - 1]
    before = chain.stages[i - 2].ledger if i > 1 else None
    width = len(before.parts.output_bytes) if before and before.parts else 1
    ledgers = [narrowed(ledger, values, width) for ledger in stage.ledgers]
    assert ledgers[0].parts is not None
    own = ledgers[0].parts.new_bytes
    state = 0 if i == len(chain) else own  # the caller holds the output
    less = stage.state_bytes - state
    pairs = zip(stage.tapes, ledgers, strict=True)
    tapes = [replace(x, tape_bytes=x.tape_bytes - less, ledger=ledger) for x, ledger in pairs]
    return replace(
        stage,
        name=chain.stage_name(i),
        state_bytes=state,
        tape_bytes=tapes[0].tape_bytes,
        gradient_bytes=stage.gradient_bytes if i == len(chain) else own,
        ledger=tapes[0].ledger,
        other_tapes=tuple(tapes[1:]),
    )


def _quoted(name: str) -> str:
    """A name without blanks and without the signs of the schedule language."""
    return "".join(quote(c, safe="") if c.isspace() or c in "%:@>" else c for c in name)


def _check_names(names: Sequence[str]) -> None:
    seen: set[str] = set()
    for i, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise WorkloadError(f"node {i} needs a name, found {name!r}")
        if name in seen:
            raise WorkloadError(f"two nodes are called {name!r}; the input counts as one")
        seen.add(name)


def _check_reads(graph: Graph) -> None:
    n, names = len(graph), graph.names
    if len(graph.reads) != n:
        raise WorkloadError(f"{n} nodes need as many tuples of reads, found {len(graph.reads)}")
    for i, sources in enumerate(graph.reads, 1):
        if not sources:
            raise WorkloadError(
                f"node {names[i]!r} reads nothing: let it read {graph.input_name!r}, the input"
            )
        whole = all(isinstance(u, int) and not isinstance(u, bool) for u in sources)
        if (
            not whole
            or list(sources) != sorted(set(sources))
            or not 0 <= sources[0] <= sources[-1] < i
        ):
            raise WorkloadError(
                f"node {names[i]!r} must read nodes before it, each once and ascending, from 0 "
                f"to {i - 1}; found {sources}"
            )
    sinks = [names[i] for i in range(1, n + 1) if not graph.readers[i]]
    if len(sinks) > 1:
        raise WorkloadError(
            f"the loss sees one state, but {len(sinks)} nodes are read by no other: "
            f"{', '.join(map(repr, sinks))}; join them in a node"
        )


def _structure(graph: nx.DiGraph[str]) -> dict[str, Any]:
    """Stages, reads and the input's name, in topological order."""
    import networkx as nx

    try:
        cycle = [str(edge[0]) for edge in nx.find_cycle(graph)]
    except nx.NetworkXNoCycle:
        pass
    else:
        raise WorkloadError(f"the graph has a cycle: {' -> '.join([*cycle, cycle[0]])}")
    bare = [node for node in graph if "stage" not in graph.nodes[node]]
    if len(bare) != 1:
        found = ", ".join(map(repr, bare)) if bare else "none"
        raise WorkloadError(
            f"one node must have no attribute 'stage', the input; without one: {found}"
        )
    (entry,) = bare
    if graph.in_degree(entry):
        before = next(iter(graph.predecessors(entry)))
        raise WorkloadError(f"{entry!r} reads {before!r}, and has no attribute 'stage'")
    place = {node: i for i, node in enumerate(graph)}
    order = list(nx.lexicographical_topological_sort(graph, key=place.__getitem__))
    order.remove(entry)
    number = {node: i for i, node in enumerate([entry, *order])}
    return {
        "stages": tuple(_named(graph.nodes[node]["stage"], node) for node in order),
        "reads": tuple(tuple(sorted(number[u] for u in graph.predecessors(v))) for v in order),
        "input_name": entry,
    }


def _named(stage: object, name: str) -> Stage:
    if not isinstance(stage, Stage):
        raise WorkloadError(f"attribute 'stage' of node {name!r} must be a Stage, found {stage!r}")
    return replace(stage, name=name, ledger=None)


def _number_of(number: Mapping[str, int], node: Mapping[str, Any]) -> Iterable[int]:
    for read in node["reads"]:
        if read not in number:
            raise WorkloadError(
                f"node {node['name']!r} reads {read!r}, which is no input and no node before it"
            )
        yield number[read]
