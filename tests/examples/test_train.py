"""The training example: it runs, stays on its plan, and goes on as if it had not stopped."""

import contextlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

import ckptsched as cs
from examples import train
from tests.support.cifar_files import write_cifar

TINY = ["--data", "digits", "--limit", "32", "--batch", "16", "--device", "cpu"]
TINY += ["--method", "heun", "--steps", "2", "--epochs", "2"]


def state(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_same_run(one: Path, other: Path) -> None:
    a, b = state(one), state(other)
    assert a["epoch"] == b["epoch"]
    assert a["model"].keys() == b["model"].keys()
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name
    momenta = [s["optimizer"]["state"] for s in (a, b)]
    for index, slot in momenta[0].items():
        assert torch.equal(slot["momentum_buffer"], momenta[1][index]["momentum_buffer"])
    assert a["scheduler"]["_last_lr"] == b["scheduler"]["_last_lr"]
    assert torch.equal(a["random_state"][0], b["random_state"][0])


@dataclass(frozen=True)
class Straight:
    """A run that was not interrupted."""

    arguments: list[str]
    checkpoint: Path
    accuracy: float
    output: str


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Straight]:
    """The tiny run to its end, by budget."""
    runs = {}
    for budget in ("none", "50%"):
        path = tmp_path_factory.mktemp("straight") / "run.ckpt"
        arguments = [*TINY, "--budget", budget]
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            accuracy = train.main([*arguments, "--checkpoint", str(path)])
        runs[budget] = Straight(arguments, path, accuracy, output.getvalue())
    return runs


@pytest.mark.parametrize("budget", ["none", "50%"])
def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, budget: str, straight: dict[str, Straight]
) -> None:
    run, path = straight[budget], tmp_path / "stopped.ckpt"
    train.main([*run.arguments, "--checkpoint", str(path), "--stop-after", "1"])
    assert state(path)["epoch"] == 1
    torch.manual_seed(123)  # a new process would start with other random numbers
    assert train.main([*run.arguments, "--checkpoint", str(path), "--resume"]) == run.accuracy
    assert_same_run(run.checkpoint, path)


def test_a_run_that_died_within_an_epoch_goes_on_from_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: dict[str, Straight]
) -> None:
    run, died = straight["none"], tmp_path / "died.ckpt"
    real, epochs = train._train_epoch, []

    def second_epoch_dies(*given: Any) -> float:
        loss = real(*given)
        epochs.append(loss)
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return loss

    monkeypatch.setattr(train, "_train_epoch", second_epoch_dies)
    with pytest.raises(KeyboardInterrupt):
        train.main([*run.arguments, "--checkpoint", str(died)])
    train.main([*run.arguments, "--checkpoint", str(died), "--resume"])
    assert len(epochs) == 3
    assert_same_run(run.checkpoint, died)


def test_budget_and_plain_autograd_train_to_the_same_weights(
    straight: dict[str, Straight],
) -> None:
    plain, planned = (state(straight[b].checkpoint)["model"] for b in ("none", "50%"))
    for name, value in plain.items():
        torch.testing.assert_close(planned[name], value, msg=name)


def test_the_plan_is_printed_kept_and_used_again_unless_the_budget_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: dict[str, Straight]
) -> None:
    run, path = straight["50%"], tmp_path / "run.ckpt"
    plan = cs.Plan.from_json(json.loads(state(run.checkpoint)["plan"]["plan"]))
    assert plan.peak_bytes <= plan.budget_bytes
    assert str(plan) in run.output
    shutil.copy(run.checkpoint, path)
    profiled = []
    real = cs.profile
    monkeypatch.setattr(cs, "profile", lambda *given: profiled.append(given) or real(*given))
    train.main([*run.arguments, "--checkpoint", str(path), "--resume"])
    assert not profiled
    train.main([*run.arguments, "--budget", "80%", "--checkpoint", str(path), "--resume"])
    assert len(profiled) == 1


def test_each_epoch_and_the_end_are_reported(straight: dict[str, Straight]) -> None:
    run = straight["none"]
    lines = run.output.splitlines()
    assert lines[0].startswith("epoch 1/2: training loss ")
    assert lines[1].startswith("epoch 2/2: training loss ")
    assert lines[2] == f"final held-out accuracy {run.accuracy:.2%} after 2 epochs"
    assert 0 <= run.accuracy <= 1


def test_a_finished_run_that_is_resumed_only_evaluates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], straight: dict[str, Straight]
) -> None:
    run, path = straight["none"], tmp_path / "run.ckpt"
    shutil.copy(run.checkpoint, path)
    assert train.main([*run.arguments, "--checkpoint", str(path), "--resume"]) == run.accuracy
    assert path.read_bytes() == run.checkpoint.read_bytes()
    assert "training loss" not in capsys.readouterr().out


def test_cifar_trains_from_its_folder(tmp_path: Path) -> None:
    write_cifar(tmp_path, torchvision.datasets.CIFAR100)
    arguments = ["--data", "cifar100", "--data-root", str(tmp_path), "--batch", "3"]
    arguments += ["--model", "squeezenext", "--method", "heun", "--steps", "1", "--epochs", "1"]
    arguments += ["--budget", "none", "--device", "cpu"]
    with pytest.raises(RuntimeError, match="checksum"):
        train.main(arguments)
    assert 0 <= train.main([*arguments, "--unverified"]) <= 1


def test_resume_without_a_checkpoint_yet_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs" / "new.ckpt"
    train.main([*TINY, "--epochs", "1", "--budget", "none", "--checkpoint", str(path), "--resume"])
    assert f"no checkpoint at {path} yet" in capsys.readouterr().out
    assert [file.name for file in path.parent.iterdir()] == ["new.ckpt"]


def test_a_checkpoint_of_another_run_is_refused(straight: dict[str, Straight]) -> None:
    run = straight["none"]
    arguments = [*run.arguments, "--checkpoint", str(run.checkpoint)]
    with pytest.raises(ValueError, match=r"--lr was 0\.1 and is 0\.2 now; give the same"):
        train.main([*arguments, "--resume", "--lr", "0.2"])


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.ckpt"
    arguments = [*TINY, "--budget", "none", "--checkpoint", str(path)]
    train.main([*arguments, "--stop-after", "1"])
    before = path.read_bytes()

    def disk_full(content: object, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        train.main([*arguments, "--resume"])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["run.ckpt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume needs --checkpoint"),
        (["--batch", "0"], "0 is less than 1"),
        (["--checkpoint", __file__], "exists; add --resume to go on"),
        (["--model", "vgg"], "invalid choice: 'vgg'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main([*TINY, *arguments])
    assert message in capsys.readouterr().err


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match="--batch 64 is more than the 32 training images"):
        train.main([*TINY, "--batch", "64"])


def test_a_budget_below_the_least_says_what_would_work() -> None:
    with pytest.raises(cs.InfeasibleBudgetError, match="least"):
        train.main([*TINY, "--budget", "10KiB"])
