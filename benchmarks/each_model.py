"""The command line of benchmarks that measure models one by one."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

Case = TypeVar("Case")


def measure_each(
    cases: Mapping[str, Callable[[], Case]],
    measure: Callable[[str, Case, int], Mapping[str, Any]],
    about: str | None,
    *,
    rounds: int,
    ignored: type[Warning],
) -> None:
    """Measure the models that are asked for, and write what was measured if asked to.

    Args:
        cases: Makes each model, by name.
        measure: Measures one in so many rounds, and prints it; gives what is written of it.
        about: What the benchmark is for.
        rounds: How many there are unless another number is asked for.
        ignored: Warnings that are left out.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=list(cases), choices=list(cases))
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ignored)
    written = []
    for name in asked.models:
        torch.manual_seed(0)
        written.append({"model": name, **measure(name, cases[name](), asked.rounds)})
    if asked.json:
        versions = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        asked.json.write_text(json.dumps({**versions, "models": written}, indent=1) + "\n")
