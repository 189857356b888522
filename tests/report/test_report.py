"""The report: rows with the baselines that fit, plots, data, and pictures in text."""

import io
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ckptsched.base.budget import format_bytes, format_seconds
from ckptsched.base.errors import BudgetSyntaxError, CkptschedError, InfeasibleBudgetError
from ckptsched.base.text_table import Grid
from ckptsched.executor.verify import Verification
from ckptsched.fitting.planning import plan
from ckptsched.planner.plan import Plan
from ckptsched.planner.plan_words import words_of_class
from ckptsched.planner.tradeoff import Measured, Row, Tradeoff, baseline_grid, plan_grid, tradeoff
from ckptsched.report.report import Outputs, print_chain, report, timeline
from ckptsched.workload.tables import chain_grid
from tests.support.small_chains import mixed_chain, uniform_chain


@pytest.fixture(scope="module")
def found() -> Tradeoff:
    return tradeoff(mixed_chain(), 6)


def plain() -> Console:
    return Console(file=io.StringIO(), width=160, highlight=False)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def step(peak_bytes: int, *, budget_bytes: int = 2**60, difference: float = 0.0) -> Verification:
    """A verification without a model."""
    return Verification(
        budget_bytes=budget_bytes,
        projected_peak_bytes=peak_bytes,
        measured_peak_bytes=peak_bytes,
        plain_peak_bytes=2**30,
        seconds=0.3,
        plain_seconds=0.2,
        max_gradient_difference=difference,
        max_gradient=1.0,
        loss=1.0,
        loss_difference=0.0,
        buffers_equal=True,
        random_state_equal=True,
    )


def test_rows_name_exactly_the_baselines_that_fit(found: Tradeoff) -> None:
    grid = baseline_grid(found)
    for row, cells in zip(found.rows, grid.rows, strict=True):
        shown = {
            heading.split("\n")[0]
            for heading, cell in zip(grid.headings, cells, strict=True)
            if cell != "-"
        }
        fitting = {x.name for x in found.baselines if x.peak_bytes <= row.plan.budget_bytes}
        assert fitting == {x.name for x in found.fitting(row)}
        family = {name for name in fitting if name.removeprefix("every_").isdigit()}
        assert shown == fitting - family | {"budget", "our plan"} | (
            {"every_k"} if family else set()
        )
    assert "store_all" in {x.name for x in found.fitting(found.rows[-1])}
    assert "store_all" not in {x.name for x in found.fitting(found.rows[0])}


def test_the_family_of_every_k_shows_its_best(found: Tradeoff) -> None:
    family = [x for x in found.baselines if x.name in ("every_2", "every_4", "every_8")]
    assert len(family) == 3
    best = min(family, key=lambda x: x.seconds)
    shown = baseline_grid(found).rows[-1][-1]
    overhead = best.seconds / found.chain.store_all_seconds - 1
    assert shown == f"{overhead:+.1%} k={best.name[-1]}"


def test_print_shows_both_tables(found: Tradeoff) -> None:
    text = str(found)
    last = found.rows[-1].plan
    assert "12 stages" in text
    assert f"storing everything takes {format_bytes(last.store_all_bytes)}" in text
    assert f"the least budget that works is {format_bytes(last.least_budget_bytes)}" in text
    for row in found.rows:
        assert f"{row.plan.overhead:+.1%}" in text
        assert format_seconds(row.plan.seconds) in text
        assert format_bytes(row.plan.peak_bytes) in text
    assert "measured" not in text
    assert text.isascii()
    assert repr(found).startswith("<Tradeoff of 6 budgets, ")


def test_what_the_gap_is_of_is_said(found: Tradeoff) -> None:
    words = {words_of_class(row.plan) for row in found.rows if row.plan.overhead}
    [line] = [line for line in str(found).splitlines() if line.startswith("Gap:")]
    assert words
    assert all(word in line for word in words)
    assert "Gap:" not in str(replace(found, rows=found.rows[-1:]))


def test_the_knee_is_shown(found: Tradeoff, tmp_path: Path) -> None:
    import matplotlib as mpl

    knee = found.knee
    assert knee is not None
    lines = [line for line in str(found).splitlines() if "< knee" in line]
    assert len(lines) == 1
    assert str(knee.plan.budget_bytes) in lines[0]
    share = knee.plan.budget_bytes / knee.plan.store_all_bytes
    assert f"where {share:.1%} of store-all's bytes cost {knee.plan.overhead:+.1%}" in str(found)
    assert found.to_json()["knee_budget_bytes"] == knee.plan.budget_bytes
    with mpl.rc_context({"svg.fonttype": "none"}):
        found.plot(tmp_path / "with.svg")
        replace(found, rows=found.rows[:2]).plot(tmp_path / "without.svg")
    assert ">knee<" in (tmp_path / "with.svg").read_text()
    assert ">knee<" not in (tmp_path / "without.svg").read_text()
    assert "knee" not in str(replace(found, rows=found.rows[:2]))


def test_the_report_is_plain_text_in_a_file(found: Tradeoff) -> None:
    console = plain()
    report(mixed_chain(), 6, console=console)
    assert printed(console).split() == str(found).split()


def test_the_report_has_lines_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    report(mixed_chain(), 3, console=console)
    assert "\u2500" in printed(console)
    assert "\x1b[" in printed(console)


def test_measured_figures_stand_beside_projected_ones() -> None:
    plans: list[Plan] = []

    def measure(made: Plan) -> Verification:
        plans.append(made)
        return step(made.peak_bytes - 7)

    console = plain()
    measured = report(mixed_chain(), 4, measure=measure, console=console)
    assert plans == [row.plan for row in measured.rows]
    headings = plan_grid(measured).headings
    assert headings[-4:] == (
        *("measured\npeak", "of the\nbudget", "measured\ntime", "measured\noverhead"),
    )
    for row, cells in zip(measured.rows, plan_grid(measured).rows, strict=True):
        share = (row.plan.peak_bytes - 7) / row.plan.budget_bytes
        peak = format_bytes(row.plan.peak_bytes - 7)
        assert cells[-4:] == (peak, f"{share:.1%}", "300.000 ms", "+50.0%")
    text = printed(console)
    assert "every budget was kept; largest difference of a gradient 0." in text
    for cells in plan_grid(measured).rows:
        assert cells[-4] in text


def test_a_promise_that_was_not_kept_is_said() -> None:
    console = plain()
    found = report(
        mixed_chain(),
        ["60%", "100%"],
        measure=lambda made: step(2**40, budget_bytes=1, difference=0.25),
        console=console,
    )
    sizes = [row.plan.budget_bytes for row in found.rows]
    assert f"NOT as promised at {sizes} bytes" in printed(console)
    assert "gradient 0.25" in printed(console)
    assert "NOT as promised" in str(found)


def test_measuring_shows_progress_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    report(mixed_chain(), 3, measure=lambda made: step(1), console=console)
    assert "measuring" in printed(console)


def test_a_row_without_a_measurement_has_dashes(found: Tradeoff) -> None:
    done = Measured(
        peak_bytes=1, seconds=2.0, plain_seconds=0.0, max_gradient_difference=0.0, ok=True
    )
    mixed = replace(found, rows=(Row(plan=found.rows[0].plan, measured=done), found.rows[-1]))
    assert plan_grid(mixed).rows[1][-4:] == ("-", "-", "-", "-")
    assert plan_grid(mixed).rows[0][-1] == "+0.0%"


def test_files_are_written(tmp_path: Path) -> None:
    outputs = Outputs(plot=tmp_path / "t.png", json=tmp_path / "t.json")
    console = plain()
    found = report(mixed_chain(), 4, console=console, outputs=outputs)
    assert f"plot written to {tmp_path / 't.png'}" in printed(console).replace("\n", "")
    assert (tmp_path / "t.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    data = json.loads((tmp_path / "t.json").read_text())
    assert data == found.to_json()
    assert data["format"] == "ckptsched tradeoff"
    assert data["fingerprint"] == mixed_chain().fingerprint
    assert data["least_budget_bytes"] == data["rows"][0]["budget_bytes"]
    assert data["store_all_bytes"] == data["rows"][-1]["budget_bytes"]
    assert data["rows"][-1]["overhead"] == 0
    assert "store_all" in data["rows"][-1]["baselines_that_fit"]
    assert {x["name"] for x in data["baselines"]} >= {"store_all", "anode", "sqrt"}
    assert all("measured" not in row for row in data["rows"])


def test_measured_figures_are_saved(tmp_path: Path) -> None:
    outputs = Outputs(plot=tmp_path / "t.svg", json=tmp_path / "t.json")
    report(mixed_chain(), 3, measure=lambda made: step(99), console=plain(), outputs=outputs)
    data = json.loads((tmp_path / "t.json").read_text())
    assert data["rows"][0]["measured"]["peak_bytes"] == 99
    assert data["rows"][0]["measured"]["overhead"] == pytest.approx(0.5)
    assert "<svg" in (tmp_path / "t.svg").read_text()


@pytest.mark.parametrize("chain", [uniform_chain(), uniform_chain(1), mixed_chain("")])
def test_plots_of_many_shapes(chain: object, tmp_path: Path) -> None:
    tradeoff(chain, 4).plot(tmp_path / "plot.png")  # type: ignore[arg-type]
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_plot_names_units_and_baselines(found: Tradeoff, tmp_path: Path) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        found.plot(tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    for words in ("[MiB]", "Seconds of the step", "our plan at each budget", "anode", "sqrt"):
        assert words in text


def test_an_ending_that_matplotlib_does_not_know(found: Tradeoff, tmp_path: Path) -> None:
    with pytest.raises(CkptschedError, match=r"no plot can be drawn to .*plot\.xyz"):
        found.plot(tmp_path / "plot.xyz")


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        (Outputs(plot="plot.xyz"), "the ending '.xyz' is unknown; give one of"),
        (Outputs(plot="nowhere/plot.png"), "there is no folder 'nowhere'"),
        (Outputs(json="nowhere/data.json"), "there is no folder 'nowhere'"),
    ],
)
def test_files_are_checked_before_anything_is_measured(outputs: Outputs, words: str) -> None:
    def measure(made: Plan) -> Verification:
        raise AssertionError("measured before the files were checked")

    with pytest.raises(CkptschedError) as caught:
        report(mixed_chain(), 3, measure=measure, console=plain(), outputs=outputs)
    assert words in str(caught.value)


def test_data_are_saved_before_a_plot_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(Tradeoff, "plot", fail)
    outputs = Outputs(plot=tmp_path / "t.png", json=tmp_path / "t.json")
    with pytest.raises(OSError, match="no space"):
        report(mixed_chain(), 3, console=plain(), outputs=outputs)
    assert (tmp_path / "t.json").exists()


def test_a_budget_besides_that_is_too_small_is_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = plain()
    found = report(mixed_chain(), 3, also=["1KiB", "70%"], console=console)
    assert len(found.rows) == 4
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "1.000 KiB (1024 bytes)" in errors
    assert f"({found.rows[0].plan.budget_bytes} bytes)" in errors
    with pytest.raises(InfeasibleBudgetError):
        report(mixed_chain(), ["1KiB"], also=["70%"], console=console)
    with pytest.raises(BudgetSyntaxError, match="at least one budget that works, found none"):
        report(mixed_chain(), [], also=["1KiB"], console=console)


def test_a_missing_matplotlib_names_the_extra(
    found: Tradeoff, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(CkptschedError, match=r"pip install 'ckptsched\[plot\]'"):
        found.plot(tmp_path / "plot.png")


def test_a_grid_aligns_to_the_right() -> None:
    grid = Grid(title="t", headings=("a", "long\nname"), rows=(("100", "x"), ("2", "yz")))
    assert str(grid).splitlines() == [
        "  a  long",
        "     name",
        "---  ----",
        "100     x",
        "  2    yz",
    ]


def test_a_chain_is_shown_by_blocks_or_stages() -> None:
    chain = mixed_chain()
    assert [row[:2] for row in chain_grid(chain).rows] == [
        ("block0", "4"),
        ("block1", "4"),
        ("block2", "4"),
    ]
    assert len(chain_grid(replace(chain, blocks=())).rows) == 12
    console = plain()
    everything = plan(chain, budget="100%")
    print_chain(chain, console, everything)
    text = printed(console)
    assert "chain 'mixed' of 12 stages, in the planning model" in text
    assert f"{everything.least_budget_bytes} bytes" in text
    assert chain.fingerprint[:16] in text


@pytest.mark.parametrize("width", [10, 72, 500])
def test_the_timeline_shows_the_peak_at_full_height(width: int) -> None:
    made = plan(mixed_chain(), budget="50%")
    lines = timeline(made, width=width, height=8, ascii_only=True).splitlines()
    bars = [line[14:].ljust(width) for line in lines[:8]]
    assert "#" in bars[0]
    heights = [sum(row[i] == "#" for row in bars) for i in range(min(width, len(made.schedule)))]
    assert max(heights) == 8
    for upper, lower in itertools.pairwise(bars):
        assert all(below == "#" for above, below in zip(upper, lower, strict=True) if above == "#")
    assert format_bytes(made.peak_bytes) in lines[0]
    marks = "\n".join(lines[9:-1])
    assert "^ peak" in marks
    assert "^ turn" in marks
    column = next(line.index("^ peak") for line in lines[9:-1] if "^ peak" in line) - 14
    assert bars[0][column] == "#"
    assert f"{len(made.schedule)} operations" in lines[-1]


def test_the_timeline_uses_block_characters_where_it_can() -> None:
    assert "\N{FULL BLOCK}" in timeline(plan(uniform_chain(2), budget="100%"))
