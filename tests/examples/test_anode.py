"""The scripts of the ANODE paper's experiments: each runs at a tiny size and shows its point."""

import math
from pathlib import Path

import pytest
from torchvision import datasets

from examples.anode import gradient_error, memory, reversing, reversing_image, training
from tests.support.cifar_files import write_cifar


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_what_is_solved_there_and_back_is_the_worse_the_stiffer(tmp_path: Path) -> None:
    path = tmp_path / "reversing.png"
    result = reversing.main(["--tiny", "--plot", str(path)])
    assert result.scalar[1, 1e-3][0] < 1e-3 < result.scalar[10, 1e-3][0]
    grids = reversing.TINY.grids
    orders = {m: reversing.order(result.fixed, m, grids) for m in reversing.METHODS}
    # Methods of an even order gain one where the error is that of there and back.
    assert orders["midpoint"] == pytest.approx(3, abs=0.2)
    assert orders["rk4_classic"] == pytest.approx(5, abs=0.2)
    assert is_picture(path)


def test_every_activation_is_reversed_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "images.png"
    found = reversing_image.main(["--tiny", "--plot", str(path)])
    assert {name for _, name, _ in found} == set(reversing_image.ACTIVATIONS)
    one, several = reversing_image.TINY.cases
    for name in reversing_image.ACTIVATIONS:
        errors = [found[case, name, 1e-3][0].error for case in (one, several)]
        assert 0 < errors[0] < errors[1]
    assert is_picture(path)


def test_backsolve_is_off_by_the_order_and_ours_by_nothing(tmp_path: Path) -> None:
    path = tmp_path / "gradients.png"
    rows = gradient_error.main(["--tiny", "--plot", str(path)])
    assert all(row.ours == 0 for row in rows.values())
    assert all(row.finite_difference < 1e-4 for row in rows.values())
    assert min(row.backsolve for row in rows.values()) > 1e-4
    assert is_picture(path)


def test_peaks_follow_the_laws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "memory.png"
    rows = memory.main(["--tiny", "--plot", str(path)])
    assert "fixed budget" in capsys.readouterr().out
    assert rows[2, 3, "ANODE"].peak_bytes < rows[2, 3, "plain"].peak_bytes
    assert all(row.gradient_difference == 0 for row in rows.values())
    assert is_picture(path)


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_both_gradients_train_from_the_same_weights(tmp_path: Path, method: str) -> None:
    path = tmp_path / "training.png"
    arguments = ["--networks", "resnet", "--methods", method, "--epochs", "1", "--limit", "16"]
    runs = training.main([*arguments, "--plot", str(path)])
    exact, inexact = (runs["resnet", method, gradient] for gradient in training.GRADIENTS)
    # One batch: its loss is told before anything is learnt.
    assert exact.losses == pytest.approx(inexact.losses, rel=1e-5)
    [(error, cosine)] = exact.errors
    assert 0 < error < 2
    assert -1 < cosine < 1
    assert is_picture(path)


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_cifar_is_trained_on_where_its_files_are(tmp_path: Path, data: str) -> None:
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[data]
    write_cifar(tmp_path, kind)
    arguments = ["--data", data, "--data-root", str(tmp_path), "--epochs", "1", "--seed", "1"]
    with pytest.raises(RuntimeError, match="damaged"):  # not the published files
        training.main([*arguments, "--networks", "squeezenext", "--methods", "midpoint"])
    runs = training.main(
        [*arguments, "--networks", "squeezenext", "--methods", "midpoint", "--own-files"]
    )
    exact, inexact = (runs["squeezenext", "midpoint", g] for g in training.GRADIENTS)
    # One batch of the same images, shifted and mirrored alike, before anything is learnt.
    assert exact.losses == pytest.approx(inexact.losses, rel=1e-5)
    assert exact.losses[0] == pytest.approx(math.log(int(data[5:])), rel=0.3)
    assert not exact.stopped


def test_a_run_that_diverges_is_told_and_ends() -> None:
    runs = training.main(["--networks", "fc", "--methods", "euler", "--epochs", "3"])
    exact, inexact = (runs["fc", "euler", gradient] for gradient in training.GRADIENTS)
    assert not exact.stopped
    assert exact.losses[-1] < exact.losses[0]
    assert inexact.stopped
    assert len(inexact.accuracies) < 3


def test_the_order_of_errors_below_rounding_is_not_told() -> None:
    assert math.isnan(reversing.order({("euler", 1): 0.0, ("euler", 2): 0.0}, "euler", (1, 2)))


def test_an_order_is_told_of_errors_that_have_one_alone() -> None:
    assert gradient_error.order([3.0, 1.0, 0.25, 0.06]) == pytest.approx(2, abs=0.1)
    # As with ReLU, whose kinks lie in other places of other steps.
    assert gradient_error.order([0.0112, 0.00565, 4.84e-06, 0.000111]) is None
    assert gradient_error.order([0.0454, 0.00721, 0.00242, 0.000507]) is None
    assert gradient_error.order([1.0, 0.5]) is None
