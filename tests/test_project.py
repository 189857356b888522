"""What the documents and project files say is so: commands, links, names, version."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import ckptsched

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"))
    if path.name != "CHANGELOG.md"  # it speaks of versions that are past
]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def project() -> dict:
    return tomllib.loads(read("pyproject.toml"))["project"]


def code_in(text: str) -> str:
    """The fenced blocks and the `code` in the lines of a Markdown text."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*fenced, *re.findall(r"`([^`\n]+)`", prose)])


def public_names() -> set[str]:
    """The names that ckptsched/__init__.py imports when they are asked for."""
    return set(ckptsched._HOMES)


def tracked_files() -> list[Path]:
    """The files that a commit of this tree would hold."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in files if path.is_file()]


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_make_targets_that_are_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    text = code_in(text) if path.suffix == ".md" else text
    named = set(re.findall(r"\bmake (?:[A-Z]+=\S+ )*([a-z][a-z-]*)", text))
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    assert named <= targets


def test_the_readme_names_the_two_commands() -> None:
    commands = code_in(read("README.md"))
    assert "make demo" in commands
    assert "make test" in commands


def test_command_lines_that_are_named_exist() -> None:
    from ckptsched.cli.commands import main

    named = set()
    for path in DOCUMENTS:
        code = code_in(path.read_text(encoding="utf-8"))
        named |= set(re.findall(r"^(?:\$ )?ckptsched ([a-z]+)\b", code, re.MULTILINE))
    assert {"profile", "plan", "report", "show", "verify"} <= named
    assert named <= set(main.commands)


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "Makefile"], ids=lambda path: path.name)
def test_files_that_are_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    scripts = set(re.findall(r"\b((?:examples|benchmarks|models|tests|docs)/[\w/.-]+\.\w+)", text))
    links = set(re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)[^)]*\)", text))
    missing = {name for name in scripts if not (ROOT / name).exists()}
    missing |= {name for name in links if not (path.parent / name).exists()}
    assert missing == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_modules_that_are_named_exist(path: Path) -> None:
    named = re.findall(r"`([\w/]+/\w+\.py)`", path.read_text(encoding="utf-8"))
    places = (ROOT, ROOT / "ckptsched")
    assert [name for name in named if not any((place / name).is_file() for place in places)] == []


def test_one_version_everywhere() -> None:
    import ckptsched

    version = project()["version"]
    assert ckptsched.__version__ == version
    assert re.search(rf"^## \[?{re.escape(version)}\b", read("CHANGELOG.md"), re.MULTILINE)


def test_public_names_are_the_documented_ones() -> None:
    documented = set(re.findall(r"^\| `(\w+)", read("docs/api.md"), re.MULTILINE))
    assert documented == public_names() | {"__version__"}


def test_callbacks_of_trainers_are_documented_though_not_everyone_can_import_them() -> None:
    said = code_in(read("docs/api.md"))
    for name, home in ckptsched._FOR_TRAINERS.items():
        assert f"ckptsched.{name}" in said
        assert (ROOT / "ckptsched" / f"{home.replace('.', '/')}.py").is_file()
        assert name not in ckptsched.__all__


def test_public_names_are_there_and_described() -> None:
    import ckptsched

    undescribed = {
        name for name in public_names() if not (getattr(ckptsched, name).__doc__ or "").strip()
    }
    assert undescribed == set()


def test_no_module_is_hidden_by_a_public_name() -> None:
    modules = {path.stem for path in (ROOT / "ckptsched").iterdir()} - {"__init__"}
    assert modules & public_names() == set()


def test_schedules_in_the_documents_are_valid() -> None:
    from ckptsched.schedule.language import Schedule
    from ckptsched.simulator.simulator import simulate
    from ckptsched.workload.chain import Chain
    from ckptsched.workload.stage import Stage

    stage = Stage(
        forward_seconds=1.0,
        backward_seconds=2.0,
        state_bytes=1,
        tape_bytes=3,
        gradient_bytes=1,
    )
    chain = Chain(stages=(stage,) * 3, input_bytes=1, input_gradient_bytes=1)
    shown = re.findall(r"^    (F1 .*)$", read("docs/concepts/schedule-language.md"), re.MULTILINE)
    traces = [simulate(chain, Schedule.from_text(text)) for text in shown]
    assert [trace.forwards for trace in traces] == [6, 5]
    assert traces[0].peak_bytes < traces[1].peak_bytes


def test_every_library_that_is_imported_is_declared() -> None:
    from tests.test_architecture import NEVER_IMPORTED, PACKAGE, THIRD_PARTY

    def declared(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w-]", name)[0] for name in requirements}

    extras = project()["optional-dependencies"]
    tested_alone = {name for name, places in THIRD_PARTY.items() if places <= NEVER_IMPORTED}
    always = set(THIRD_PARTY) - {PACKAGE} - tested_alone
    assert always <= declared(project()["dependencies"] + extras["plot"])
    assert tested_alone <= declared(extras["test"])


def test_the_wheel_holds_the_package_and_its_type_marker_only() -> None:
    settings = tomllib.loads(read("pyproject.toml"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert settings == {"packages": ["ckptsched"]}
    assert (ROOT / "ckptsched" / "py.typed").exists()


# Put together from pieces, so that this file does not hold what it looks for.
_FOLDERS = "|".join(["home", "Users", "root", "work"])
MACHINE_PATH = re.compile(rf"(?<![\w.*)}}/-])/(?:{_FOLDERS})/|[A-Z]:\\(?:{_FOLDERS})\b")


def test_no_path_of_one_machine_in_a_file() -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            for number, line in enumerate(text.splitlines(), 1)
            if MACHINE_PATH.search(line)
        ]
    assert found == []


@pytest.mark.parametrize("folder", _FOLDERS.split("|"))
def test_the_search_for_machine_paths_can_fail(folder: str) -> None:
    assert MACHINE_PATH.search(f'open("/{folder}/someone/data")')
    assert not MACHINE_PATH.search(f"docs/{folder}/page.md")


def test_type_checkers_see_the_public_names() -> None:
    """They cannot follow `__getattr__`: each name is imported for them from its home."""
    tree = ast.parse((ROOT / "ckptsched" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {**ckptsched._HOMES, **ckptsched._FOR_TRAINERS}
    for name in ckptsched.__all__:
        assert getattr(ckptsched, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ckptsched.nothing  # noqa: B018
    assert set(ckptsched.__all__) <= set(dir(ckptsched))
