"""How near a forecast is to what is measured, on the models of the zoo.

    python -m benchmarks.will_it_fit
    python -m benchmarks.will_it_fit --only llama gpt2 --json will_it_fit.json

For each model that is recorded, figures of `profile(fake=True)` over those of `profile`: bytes of
all states, of all tapes, the peak of a step that stores all, and the least budget. On the CPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import ckptsched as cs

ZOO = ("transformers", "torchvision", "timm", "torchaudio", "segmentation", "sequences_and_sets")


@dataclass(frozen=True)
class Row:
    """A model; all but its name are estimated over measured."""

    name: str
    states: float
    tapes: float
    peak: float
    least: float


def main() -> None:
    """Print a row a model, and the widest of each column."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", nargs="*", default=ZOO, choices=ZOO)
    parser.add_argument("--only", nargs="*", default=(), help="parts of names of models")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows, failed = list[Row](), dict[str, str]()
    print(f"{'model':44} {'states':>8} {'tapes':>8} {'peak':>8} {'least':>8}")
    for zoo in options.zoo:
        models = importlib.import_module(f"tests.zoo.test_{zoo}").MODELS
        for name, make in models.items():
            if options.only and not any(part in name for part in options.only):
                continue
            try:
                rows.append(compare(f"{zoo} {name}", make))
                print(line(rows[-1]), flush=True)
            except cs.CkptschedError as error:
                failed[f"{zoo} {name}"] = str(error)
                print(f"{zoo} {name:40} {str(error)[:160]}", flush=True)
    if rows:
        for column in ("states", "tapes", "peak", "least"):
            found = sorted(abs(getattr(row, column) - 1) for row in rows)
            middle = found[len(found) // 2]
            print(f"{column}: off by at most {found[-1]:.2%}, by {middle:.2%} at the median")
    print(f"{len(rows)} models, {len(failed)} without an estimate")
    if options.json:
        data = {"rows": [asdict(row) for row in rows], "failed": failed}
        options.json.write_text(json.dumps(data, indent=1))


def compare(name: str, make: object) -> Row:
    """Estimate and measure a model."""
    torch.manual_seed(0)
    assert callable(make)
    training = make()
    given = {"kwargs": training.kwargs}
    guessed = cs.profile(training.model, *training.args, **given, fake=True)
    measured = cs.profile(training.model, *training.args, **given, progress=False)
    plans = [cs.plan(chain, budget="100%") for chain in (guessed, measured)]

    def ratio(figure: str) -> float:
        one, other = (
            sum(getattr(stage, figure) for stage in chain.stages) for chain in (guessed, measured)
        )
        return one / other

    return Row(
        name=name,
        states=ratio("state_bytes"),
        tapes=ratio("tape_bytes"),
        peak=plans[0].peak_bytes / plans[1].peak_bytes,
        least=plans[0].least_budget_bytes / plans[1].least_budget_bytes,
    )


def line(row: Row) -> str:
    """A row of the table."""
    return f"{row.name:44} {row.states:8.4f} {row.tapes:8.4f} {row.peak:8.4f} {row.least:8.4f}"


if __name__ == "__main__":
    main()
