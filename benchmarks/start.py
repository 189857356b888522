"""How long people wait when they begin: processor seconds of the first import, command, plan, fit.

    python -m benchmarks.start
    python -m benchmarks.start --document

Each row is a process of its own. *Cold* has empty caches: no plans, no machine code of numba, no
counting allocator, and no bytecode of this package; that of others is there, as pip leaves it.
*Warm* is the least of three runs after it. Seconds are of the processor, of all threads and of
what they start, so that waiting does not count; threads of OpenMP sleep while they wait for each
other, as on a busy machine they would count as working for as long as others have the cores.
*Beyond* leaves out what a process takes that does nothing, or that imports torch alone where a
network is fitted.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import ckptsched
from benchmarks.document import Section

_NETWORK = """
import torch
from torch import nn
import ckptsched
layers = [module for _ in range({pairs}) for module in (nn.Linear(64, 64), nn.Tanh())]
"""
_FIT = _NETWORK + 'ckptsched.fit(nn.Sequential(*layers), torch.randn(4096, 64), budget="60%")'
_SAVE = _NETWORK + (
    "import sys\nckptsched.profile(nn.Sequential(*layers), torch.randn(4096, 64)).save(sys.argv[1])"
)
_STAGES = (24, 48)
_WARM_RUNS = 3
_PACKAGE = Path(ckptsched.__file__).parent


@dataclass(frozen=True)
class Case:
    """One way to begin."""

    name: str
    arguments: tuple[str, ...]
    """Of the interpreter."""
    beyond: str = "python"
    """The case whose seconds are taken off."""


def cases(chain: Path) -> tuple[Case, ...]:
    """What is timed.

    Args:
        chain: A saved chain.
    """
    command = ("-m", "ckptsched")
    return (
        Case("python", ("-c", "pass"), beyond=""),
        Case("import torch", ("-c", "import torch")),
        Case("import ckptsched", ("-c", "import ckptsched")),
        Case("ckptsched --help", (*command, "--help")),
        Case("ckptsched plan chain.json", (*command, "plan", str(chain), "--budget", "60%")),
        *(
            Case(
                f"the first fit of {stages} stages",
                ("-W", "ignore", "-c", _FIT.format(pairs=stages // 2)),
                "import torch",
            )
            for stages in _STAGES
        ),
    )


def processor_seconds(arguments: Sequence[str], environment: Mapping[str, str]) -> float:
    """Run the interpreter; processor seconds of it and of all that it has started.

    Args:
        arguments: Of the interpreter.
        environment: Its environment.
    """
    before = os.times()
    subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    after = os.times()
    return (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )


def in_folder(folder: Path) -> dict[str, str]:
    """An environment whose caches lie in a folder."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    (folder / "plans").mkdir(parents=True)
    return environment | {
        "CKPTSCHED_CACHE": str(folder / "plans"),
        "NUMBA_CACHE_DIR": str(folder / "machine code"),
        "PYTHONPYCACHEPREFIX": str(folder.parent / "bytecode"),
        "OMP_WAIT_POLICY": "passive",
    }


def without_own_bytecode(environment: Mapping[str, str]) -> None:
    """Remove what Python has compiled of this package."""
    kept = Path(environment["PYTHONPYCACHEPREFIX"]) / str(_PACKAGE).lstrip(os.sep)
    shutil.rmtree(kept, ignore_errors=True)


def rows() -> list[tuple[str, float, float, float, float]]:
    """Name, cold and warm seconds, and the same beyond what is taken off."""
    found: dict[str, tuple[float, float]] = {}
    beyond: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as root:
        chain = Path(root) / "chain.json"
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _SAVE.format(pairs=24), str(chain)],
            env=in_folder(Path(root) / "saving"),
            check=True,
        )
        for number, case in enumerate(cases(chain)):
            environment = in_folder(Path(root) / str(number))
            processor_seconds(case.arguments, in_folder(Path(root) / f"bytecode of {number}"))
            without_own_bytecode(environment)
            cold = processor_seconds(case.arguments, environment)
            warm = min(processor_seconds(case.arguments, environment) for _ in range(_WARM_RUNS))
            found[case.name], beyond[case.name] = (cold, warm), case.beyond
    base = {name: found[name][1] for name in found}
    return [
        (name, cold, warm, cold - base.get(beyond[name], 0.0), warm - base.get(beyond[name], 0.0))
        for name, (cold, warm) in found.items()
    ]


def table() -> str:
    """The figures, and what they were taken on."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "numba"))
    threads = os.environ.get("OMP_NUM_THREADS", "as many as cores")
    lines = [
        f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, "
        f"{versions}; threads of OpenMP: {threads}; load when it began "
        f"{os.getloadavg()[0]:.1f}.",
        "",
        "| | cold | warm | cold, beyond | warm, beyond |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, *seconds in rows():
        lines.append(f"| {name} | " + " | ".join(f"{x:.2f} s" for x in seconds) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table; write it to the document where that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--document", action="store_true", help="also write docs/measured/start.md")
    options = parser.parse_args()
    found = table()
    print(found)
    if options.document:
        Section("benchmarks.start").write(found)


if __name__ == "__main__":
    main()
