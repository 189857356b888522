"""The commands: what they print and write, and errors as one line and exit code 2."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.core import ParameterSource
from click.testing import CliRunner, Result

from ckptsched.cli.commands import main
from ckptsched.executor.verify import Verification
from ckptsched.fitting.largest_that_fits import largest_batch, largest_steps, least_budget
from ckptsched.fitting.planning import plan
from ckptsched.planner.plan import Plan
from ckptsched.workload.chain import Chain
from ckptsched.workload.graph import Graph
from tests.support.small_chains import mixed_chain

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def failure(*arguments: str) -> str:
    """The one line of an error."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_plan_prints_and_saves(folder: Path) -> None:
    result = run("plan", "chain.json", "--budget", "50%", "-o", "plan.json")
    assert result.exit_code == 0, result.output
    made = Plan.load("plan.json")
    assert made == plan(mixed_chain(), budget="50%")
    assert result.stdout == f"{made}\n\nplan written to plan.json\n"


def test_plan_with_a_solver(folder: Path) -> None:
    result = run("plan", "chain.json", "--budget", "1 GiB", "--solver", "anode")
    assert "solver          anode" in result.stdout


def test_plan_for_an_overhead(folder: Path) -> None:
    result = run("plan", "chain.json", "--overhead", "10%", "-o", "plan.json")
    assert result.exit_code == 0, result.output
    made = Plan.load("plan.json")
    assert made == least_budget(mixed_chain(), overhead=0.1)
    assert "asked for as at most 10% overhead" in result.stdout
    assert "an overhead of 'much' cannot be planned" in failure(
        "plan", "chain.json", "--overhead", "much"
    )


@pytest.mark.parametrize("extra", [(), ("--budget", "50%", "--overhead", "10%")])
def test_plan_needs_a_budget_or_an_overhead(folder: Path, extra: tuple[str, ...]) -> None:
    result = run("plan", "chain.json", *extra)
    assert result.exit_code == 2
    assert "give --budget or --overhead, one of the two" in result.stderr


def test_the_largest_batch(folder: Path) -> None:
    result = run("largest", "chain.json", "--budget", "200MiB", "-o", "plan.json")
    assert result.exit_code == 0, result.output
    found = largest_batch(mixed_chain(), budget="200MiB")
    assert result.stdout == f"{found}\n\nplan written to plan.json\n"
    assert Plan.load("plan.json") == found.plan
    model = ("nets_of_test:mlp", "--input", "6x4", "--fake")
    result = run("largest", *model, "--budget", "20kB", "--overhead", "300%")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("largest size: ")
    assert "needs an input" in failure("largest", "nets_of_test:mlp", "--budget", "20kB")
    # What is wrong with the model is said first.
    assert "no_such_module" in failure("largest", "no_such_module:net", "--budget", "20kB")
    assert "is a share of a size" in failure("largest", "chain.json", "--budget", "50%")


def test_the_most_steps(folder: Path) -> None:
    options = ("--budget", "40MiB", "--overhead", "20%")
    result = run("largest", "chain.json", "--steps", *options)
    assert result.exit_code == 0, result.output
    found = largest_steps(mixed_chain(), budget="40MiB", overhead="20%")
    assert result.stdout == f"{found}\n"


def test_no_more_steps_are_tried_than_were_allowed(folder: Path) -> None:
    command = ("largest", "chain.json", "--steps", "--budget", "1GiB")
    result = run(*command, "--most", "6")
    assert "largest size: 6; no more than 6 was tried (most=6)" in result.stdout
    assert run(*command, "--most", "0").exit_code == 2


def test_graphs_are_planned_and_shown(folder: Path) -> None:
    graph = Graph.from_chain(mixed_chain())
    graph.save("graph.json")
    result = run("plan", "graph.json", "--budget", "50%", "-o", "plan.json")
    assert result.exit_code == 0, result.output
    made = Plan.load("plan.json")
    assert made.chain == graph
    result = run("show", "plan.json", "--operations", "--explain")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(graph.schedule_text(made.schedule) + "\n")
    result = run("show", "graph.json")
    assert "graph 'mixed' of 12 stages" in result.stdout
    assert run("report", "graph.json", "--budgets", "3").exit_code == 0
    assert "takes a model" in failure("largest", "graph.json", "--budget", "90MiB")


@pytest.mark.parametrize(
    ("command", "without"),
    [
        ("--help", {"torch", "numba", "networkx", "pulp", "rich"}),
        ("plan chain.json --budget 50%", {"torch", "rich"}),
        ("show chain.json", {"torch"}),
    ],
)
def test_commands_import_no_more_than_they_need(
    folder: Path, command: str, without: set[str]
) -> None:
    code = (
        "import sys; from ckptsched.cli.commands import main; "
        f"main({command.split()!r}, standalone_mode=False); "
        f"print(sorted({without!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_time_limit_leaves_time(folder: Path) -> None:
    assert run("plan", "chain.json", "--budget", "50%", "--time-limit", "0").exit_code == 2


def test_show_explains(folder: Path) -> None:
    made = plan(mixed_chain(), budget="50%")
    made.save("plan.json")
    result = run("show", "plan.json", "--explain")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{made}\n\n{made.explain()}\n"
    result = run("show", "chain.json", "--explain")
    assert "Storing everything takes" in result.stdout


def test_no_cache(folder: Path, monkeypatch: pytest.MonkeyPatch, cache_of_its_own: Path) -> None:
    monkeypatch.setenv("CKPTSCHED_CACHE_SECONDS", "-inf")
    for command in (
        ("plan", "chain.json", "--budget", "50%"),
        ("plan", "chain.json", "--overhead", "10%"),
        ("report", "chain.json", "--budgets", "3"),
        ("show", "chain.json", "--explain"),
        ("largest", "chain.json", "--budget", "90MiB"),
    ):
        assert run(*command, "--no-cache").exit_code == 0
        assert not (cache_of_its_own / "plans").exists()
    assert run("plan", "chain.json", "--budget", "50%").exit_code == 0
    assert len(list((cache_of_its_own / "plans").iterdir())) == 1


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("-1", "'-1' is not positive"),
        ("0", "'0' is not positive"),
        ("nan", "'nan' cannot be read"),
        ("12 parsecs", "'12 parsecs' has the unknown unit 'parsecs'"),
    ],
)
def test_bad_budgets(folder: Path, budget: str, words: str) -> None:
    message = failure("plan", "chain.json", f"--budget={budget}")
    assert words in message
    assert '"512MiB", "1.5 GB" or "40%"' in message


def test_a_budget_that_is_too_small_names_one_that_works(folder: Path) -> None:
    message = failure("plan", "chain.json", "--budget", "1 KiB")
    assert "1.000 KiB (1024 bytes)" in message
    least = message.split("the least that works is")[1].split("(")[1].split(" bytes")[0]
    assert run("plan", "chain.json", "--budget", least).exit_code == 0
    assert "works" in failure("plan", "chain.json", "--budget", str(int(least) - 1))


def test_an_unknown_solver(folder: Path) -> None:
    assert "chain_dp" in failure("plan", "chain.json", "--budget", "50%", "--solver", "magic")


def test_report_prints_draws_and_saves(folder: Path) -> None:
    result = run(
        "report", "chain.json", "--budgets", "3", "--budget", "70%", "--plot", "t.png",
        "--json", "t.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    data = json.loads((folder / "t.json").read_text())
    assert len(data["rows"]) == 4
    assert (folder / "t.png").read_bytes()[:4] == b"\x89PNG"
    assert "anode" in result.stdout
    assert "plot written to t.png" in result.stdout


@pytest.mark.parametrize("command", [["profile"], ["plan", "--budget", "100%"], ["report"]])
def test_estimates_are_for_planning(folder: Path, command: list[str]) -> None:
    target = ["nets_of_test:mlp", "--input", "2x4", "--fake"]
    result = run(*command, *target)
    assert result.exit_code == 0, result.output
    assert "mlp (estimated)" in result.stdout


def test_an_estimate_is_not_measured(folder: Path) -> None:
    target = ("nets_of_test:mlp", "--input", "2x4")
    result = run("report", *target, "--fake", "--measure")
    assert result.exit_code == 2
    assert "--fake runs nothing, --measure runs every plan" in result.stderr
    message = failure("report", "chain.json", "--fake")
    assert "--fake needs a model, and 'chain.json' is a file" in message
    assert run("profile", *target, "--fake", "-o", "c.json").exit_code == 0
    assert run("plan", "c.json", "--budget", "100%", "-o", "p.json").exit_code == 0
    message = failure("verify", *target[:1], "p.json", *target[1:])
    assert "profile the model and plan that" in message


def test_report_needs_a_model_to_measure(folder: Path) -> None:
    message = failure("report", "chain.json", "--measure")
    assert "--measure needs a model, and 'chain.json' is a file" in message


def test_show_a_chain(folder: Path) -> None:
    result = run("show", "chain.json", "--timeline")
    assert result.exit_code == 0, result.output
    assert "chain 'mixed' of 12 stages" in result.stdout
    assert "block2" in result.stdout
    assert "^ peak" in result.stdout


def test_show_a_plan(folder: Path) -> None:
    made = plan(mixed_chain(), budget="50%")
    made.save("plan.json")
    result = run("show", "plan.json", "--timeline", "--operations")
    assert result.stdout.startswith(str(made))
    assert "^ turn" in result.stdout
    assert result.stdout.endswith(made.schedule.to_text() + "\n")


def test_pages_are_written(folder: Path) -> None:
    made = plan(mixed_chain(), budget="50%")
    made.save("plan.json")
    result = run("show", "plan.json", "--html", "plan.html")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("page written to plan.html\n")
    assert '"plans":[{' in Path("plan.html").read_text()
    result = run("report", "chain.json", "--budgets", "3", "--html", "t.html")
    assert result.exit_code == 0, result.output
    assert "page written to t.html" in result.stdout
    assert Path("t.html").read_text().count('"budgetBytes":') == 3
    assert "cannot be written" in failure("show", "plan.json", "--html", "nowhere/t.html")


def test_show_what_is_not_there(folder: Path) -> None:
    message = failure("show", "nowhere.json")
    assert "'nowhere.json' cannot be read: No such file or directory" in message
    assert "ckptsched profile MODEL -o FILE" in message


def test_show_what_is_damaged(folder: Path) -> None:
    text = (folder / "chain.json").read_text()
    (folder / "chain.json").write_text(text[:-20])
    assert "'chain.json' is damaged: it is not JSON" in failure("show", "chain.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", "holds neither a chain, nor a graph, nor a plan"),
        ("{}", "holds neither a chain, nor a graph, nor a plan"),
        ('{"u_f": []}', "'other.json': "),
        ('{"format": "ckptsched plan", "version": 9}', "version 9, this ckptsched reads 1"),
    ],
)
def test_show_something_else(folder: Path, content: str, words: str) -> None:
    (folder / "other.json").write_text(content)
    assert words in failure("show", "other.json")


def test_a_plan_is_no_chain(folder: Path) -> None:
    plan(mixed_chain(), budget="50%").save("plan.json")
    message = failure("report", "plan.json")
    assert "'plan.json' holds a plan: give the model or the chain" in message


def test_writing_where_nothing_can_be_written(folder: Path) -> None:
    message = failure("plan", "chain.json", "--budget", "50%", "-o", "no/plan.json")
    assert "'no/plan.json' cannot be written: there is no folder 'no'; make it" in message
    # It is said before anything is measured or planned, and names what was given.
    for command in ("profile no:model", "plan no.json --budget 1", "largest no.json --budget 1"):
        assert failure(*command.split(), "-o", "no/plan.json") == message
    with pytest.raises(FileNotFoundError) as caught:
        plan(mixed_chain(), budget="50%").save("no/plan.json")
    assert caught.value.filename == "no/plan.json"


def test_a_model_from_profile_to_verify(folder: Path) -> None:
    model = ("nets_of_test:mlp", "--input", "6x4", "--arg", "depth=2", "--arg", "activation=relu")
    result = run("profile", *model, "-o", "net.json")
    assert result.exit_code == 0, result.output
    assert "chain written to net.json" in result.stdout
    assert len(Chain.load("net.json")) == 7
    result = run("plan", "net.json", "--budget", "100%", "-o", "plan.json")
    assert result.exit_code == 0, result.output
    result = run("verify", model[0], "plan.json", *model[1:], "--rounds", "1")
    assert result.exit_code == 0, result.output
    assert "measured peak" in result.stdout
    wrong = (model[0], "plan.json", "--input", "7x4", *model[3:])
    assert "7" in failure("verify", *wrong)
    assert run("verify", *model, "--budget", "100%").exit_code == 0


def test_a_model_is_measured_in_the_report(folder: Path) -> None:
    model = ("nets_of_test:mlp", "--input", "6x4")
    result = run("report", *model, "--measure", "--rounds", "1", "--budgets", "3")
    assert result.exit_code == 0, result.output
    assert "every budget was kept" in result.stdout


def test_a_step_that_breaks_its_promise_ends_with_code_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        ok = False

        def __str__(self) -> str:
            return "verified NO"

    monkeypatch.setattr("ckptsched.executor.verify.verify", lambda *_, **__: Broken())
    result = run("verify", "nets_of_test:mlp", "--input", "6x4", "--budget", "100%")
    assert (result.exit_code, result.stdout) == (1, "verified NO\n")


@pytest.mark.parametrize(("difference", "code"), [(0.0, 0), (0.5, 1)])
def test_a_report_with_a_broken_promise_ends_with_code_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, difference: float, code: int
) -> None:
    def step(_model: object, plan: Plan, _sample: object, **_: object) -> Verification:
        return Verification(
            budget_bytes=plan.budget_bytes,
            projected_peak_bytes=plan.peak_bytes,
            measured_peak_bytes=plan.peak_bytes,
            plain_peak_bytes=plan.store_all_bytes,
            seconds=1.0,
            plain_seconds=1.0,
            max_gradient_difference=difference,
            max_gradient=1.0,
            loss=1.0,
            loss_difference=0.0,
            buffers_equal=True,
            random_state_equal=True,
        )

    monkeypatch.setattr("ckptsched.executor.verify.verify", step)
    result = run(
        "report", "nets_of_test:mlp", "--input", "6x4", "--measure", "--budgets", "2",
        "--json", "t.json",
    )  # fmt: skip
    assert result.exit_code == code, result.output
    assert ("NOT as promised" in result.stdout) == bool(code)
    assert (folder / "t.json").exists()


def test_a_plot_of_unknown_ending_is_refused_before_profiling(folder: Path) -> None:
    # The model does not even exist: the ending comes first.
    message = failure("report", "no_such:model", "--measure", "--plot", "t.xyz")
    assert "the ending '.xyz' is unknown" in message


def test_a_report_goes_on_without_a_budget_that_is_too_small(folder: Path) -> None:
    result = run("report", "chain.json", "--budgets", "3", "--budget", "1 KiB")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("Left out: ")
    assert result.stderr.count("\n") == 1
    assert "the least that works is" in result.stderr
    assert "Plans" in result.stdout


def test_an_argument_that_a_model_refuses_is_named(folder: Path) -> None:
    message = failure(
        "plan", "nets_of_test:ode", "--input", "6x4", "--budget", "50%", "--arg", "steps=0"
    )
    assert "steps is 0; give an int of at least 1" in message


def documented_commands() -> list[str]:
    """Every line of the documentation that calls ckptsched."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    found = []
    for file in files:
        for code in file.read_text(encoding="utf-8").split("```")[1::2]:
            whole = code.replace("\\\n", " ").splitlines()
            lines = (line.strip().removeprefix("$ ") for line in whole)
            found += [line for line in lines if line.startswith("ckptsched ")]
    return found


def test_the_documentation_calls_ckptsched() -> None:
    assert len(documented_commands()) >= 5


@pytest.mark.parametrize("line", documented_commands())
def test_documented_commands_can_be_read(line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    command = main.commands[name]
    context = command.make_context(name, list(arguments))
    sources = {p.name: context.get_parameter_source(str(p.name)) for p in command.params}
    read = {name for name, source in sources.items() if source is ParameterSource.COMMANDLINE}
    named = {p.name for p in command.params if set(p.opts) & set(arguments)}
    assert named < read, "besides its options, each line names a model or a file"


@pytest.mark.parametrize("extra", [(), ("plan.json", "--budget", "50%")])
def test_verify_needs_one_budget(folder: Path, extra: tuple[str, ...]) -> None:
    result = run("verify", "nets_of_test:mlp", *extra)
    assert result.exit_code == 2
    assert "give a saved plan or --budget, one of the two" in result.stderr


def test_verify_needs_a_model(folder: Path) -> None:
    message = failure("verify", "chain.json", "--budget", "50%")
    assert "verify needs a model, and 'chain.json' is a file: give module:callable" in message


def test_a_model_needs_an_input(folder: Path) -> None:
    message = failure("plan", "nets_of_test:mlp", "--budget", "50%")
    assert "--input 8x3x32x32" in message


def test_a_module_that_fails(folder: Path) -> None:
    (folder / "failing_of_test.py").write_text("1 / 0\n")
    assert "Error: " in failure("plan", "failing_of_test:mlp", "--budget", "1", "--input", "2x4")


def test_argument_pairs(folder: Path) -> None:
    command = main.commands["plan"]
    option = next(p for p in command.params if p.name == "arguments")
    texts = ("a=8", "b=[1, 2]", "c=rk4", "d=", "e=x=y")
    with click.Context(command) as ctx:
        found = option.process_value(ctx, texts)
    assert found == {"a": 8, "b": [1, 2], "c": "rk4", "d": "", "e": "x=y"}
    result = run("plan", "nets_of_test:mlp", "--budget", "1", "--arg", "steps")
    assert result.exit_code == 2
    assert "'steps' is not key=value" in result.stderr


def test_help_and_version() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name in ("profile", "plan", "largest", "report", "show", "verify"):
        assert name in result.stdout
        assert run(name, "-h").exit_code == 0
    assert run("--version").stdout.startswith("ckptsched, version ")


def test_as_a_process(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "ckptsched"]

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], capture_output=True, text=True, env=environment, check=False
        )

    done = call("plan", "chain.json", "--budget", "50%", "--output", "plan.json")
    assert (done.returncode, done.stderr) == (0, "")
    done = call("show", "plan.json", "--timeline")
    assert (done.returncode, done.stderr) == (0, "")
    assert "####" in done.stdout
    done = call("show", "nowhere.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: 'nowhere.json' cannot be read")
    assert "Traceback" not in done.stderr
