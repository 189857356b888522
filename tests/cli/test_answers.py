"""Examples in the help of commands, answers as data, exit codes, lines where output is piped."""

from __future__ import annotations

import base64
import gzip
import io
import itertools
import json
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ckptsched.base import progress_bar
from ckptsched.cli.commands import main
from ckptsched.planner.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
NAMES = [name for name in main.commands if name != "completion"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def example_of(name: str) -> list[str]:
    said = main.commands[name].epilog or ""
    start, line = said.split("Example:\n  ")
    assert start == "\b\n"
    return shlex.split(line)


@pytest.fixture
def with_plan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(ROOT))  # for models/, as in a clone
    assert run("plan", "chain.json", "--budget", "60%", "-o", "plan.json").exit_code == 0
    return folder


@pytest.mark.filterwarnings("ignore::ckptsched.TimingWarning")
@pytest.mark.parametrize("name", NAMES)
def test_the_example_in_a_commands_help_runs(name: str, with_plan: Path) -> None:
    program, command, *arguments = example_of(name)
    assert (program, command) == ("ckptsched", name)
    before = {path.name for path in with_plan.iterdir()} - {"plan.json", "chain.json"}
    result = run(command, *arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout
    for flag in {"-o", "--html"} & set(arguments):
        path = with_plan / arguments[arguments.index(flag) + 1]
        assert path.name not in before
        assert path.stat().st_size > 0


DATA = {
    "plan": ("plan", "chain.json", "--budget", "60%"),
    "largest": ("largest", "chain.json", "--budget", "64MiB", "--most", "4"),
    "report": ("report", "chain.json", "--budgets", "4"),
    "show": ("show", "plan.json"),
    "show_chain": ("show", "chain.json"),
    "profile": ("profile", "nets_of_test:mlp", "--input", "64x4"),
    "verify": ("verify", "nets_of_test:mlp", "--input", "64x4", "--budget", "90%", "--rounds", "0"),
}


@pytest.mark.filterwarnings("ignore::ckptsched.TimingWarning")
@pytest.mark.parametrize("name", DATA)
def test_answers_as_data_in_the_texts_place_and_beside_it(name: str, with_plan: Path) -> None:
    alone = run(*DATA[name], "--json", "-")
    assert alone.exit_code == 0, alone.output
    data = json.loads(alone.stdout)
    beside = run(*DATA[name], "--json", "facts.json")
    assert beside.exit_code == 0, beside.output
    assert beside.stdout.endswith("data written to facts.json\n")
    written = json.loads((with_plan / "facts.json").read_text())
    assert written.keys() == data.keys()
    if name in ("plan", "show"):
        plan = Plan.load(with_plan / "plan.json")
        assert data == written
        assert data["peak_bytes"] == plan.peak_bytes
        assert data["overhead"] == plan.overhead
    if name == "report":
        assert len(data["rows"]) == 4
    if name == "verify":
        assert data["ok"] is True
        assert data["measured_peak_bytes"] <= data["projected_peak_bytes"]


def test_a_file_that_cannot_be_written_is_found_out_first(folder: Path) -> None:
    result = run("profile", "no_such_module:mlp", "--json", "missing/facts.json")
    assert result.exit_code == 2
    assert "missing" in result.stderr
    assert "no_such_module" not in result.stderr


@pytest.mark.filterwarnings("ignore::ckptsched.TimingWarning")
def test_a_verified_page_has_what_was_measured(with_plan: Path) -> None:
    given = (*DATA["verify"], "--html", "page.html")
    assert run(*given).stdout.endswith("page written to page.html\n")
    assert run(*given, "--json", "-").stdout.startswith("{")
    text = (with_plan / "page.html").read_text(encoding="utf-8")
    page = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    plan = page["plans"][0]
    columns = json.loads(gzip.decompress(base64.b64decode(plan["data"])))
    measured = list(itertools.accumulate(columns["measured"]))
    assert len(measured) == plan["operations"]
    assert max(measured) == plan["measured"]["peakBytes"]
    refused = run("verify", "no_such_module:mlp", "--budget", "90%", "--html", "missing/page.html")
    assert refused.exit_code == 2
    assert "no_such_module" not in refused.stderr


def test_exit_codes_are_said(folder: Path) -> None:
    said = run("--help").stdout
    for code, words in ((0, "done"), (1, "broke its budget"), (2, "cannot be done")):
        assert any(str(code) in line and words in line for line in said.splitlines())
    assert run("plan", "chain.json", "--budget", "1").exit_code == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    result = run("completion", shell)
    assert result.exit_code == 0
    assert "_CKPTSCHED_COMPLETE" in result.stdout
    assert run("completion", "cmd").exit_code == 2


def test_commands_are_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_CKPTSCHED_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "ckptsched ver")
    monkeypatch.setenv("COMP_CWORD", "1")
    result = CliRunner().invoke(main, [], prog_name="ckptsched")
    assert result.stdout == "plain,verify\n"


def test_lines_where_output_is_piped(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after two seconds, another ten seconds later; none in a library, or where told so."""
    clock = iter([0.0, 1.9, 2.1, 2.1, 5.0, 12.2, 12.2])
    piped = io.StringIO()
    monkeypatch.setattr(sys, "stderr", piped)
    monkeypatch.setattr(progress_bar.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(progress_bar, "lines_where_piped", True)
    with progress_bar.progress_bar() as tell:
        for share in (0.1, 0.2, 0.3, 0.4):
            tell("table of 500 stages", share)
    assert piped.getvalue() == "table of 500 stages: 20%\ntable of 500 stages: 40%\n"
    with progress_bar.progress_bar(shown=False) as tell:
        tell("table", 0.5)
    monkeypatch.setattr(progress_bar, "lines_where_piped", False)
    with progress_bar.progress_bar() as tell:
        tell("table", 0.5)
    assert "50%" not in piped.getvalue()
