"""The loaders: digits are real, CIFAR is a tiny folder in the format of the real one."""

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
import torchvision

from examples import data
from examples.data import load_cifar, load_digits
from tests.support.cifar_files import PER_FILE, write_cifar


def with_own_checksums(
    folder: Path, kind: type[torchvision.datasets.CIFAR10]
) -> type[torchvision.datasets.CIFAR10]:
    """torchvision's class, which checks these files in place of the published ones."""

    def digest(file: str) -> str:
        return hashlib.md5((folder / file).read_bytes(), usedforsecurity=False).hexdigest()

    return type(
        "TinyCifar",
        (kind,),
        {
            "train_list": [[file, digest(file)] for file, _ in kind.train_list],
            "test_list": [[file, digest(file)] for file, _ in kind.test_list],
            "meta": {**kind.meta, "md5": digest(kind.meta["filename"])},
        },
    )


KINDS = [
    ("cifar10", torchvision.datasets.CIFAR10, 10, 5),
    ("cifar100", torchvision.datasets.CIFAR100, 100, 1),
]


@pytest.mark.parametrize(("name", "kind", "classes", "files"), KINDS)
def test_cifar_is_read_and_checked_by_torchvision(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kind: type[torchvision.datasets.CIFAR10],
    classes: int,
    files: int,
) -> None:
    tiny = with_own_checksums(write_cifar(tmp_path, kind), kind)
    monkeypatch.setitem(data._CIFAR, name, tiny)
    images = load_cifar(tmp_path, name)
    assert (images.num_classes, images.in_channels) == (classes, 3)
    assert len(images.train) == files * PER_FILE
    assert len(images.held_out) == PER_FILE
    image, label = images.held_out[1]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert 0 <= label < classes
    test_file = tmp_path / kind.base_folder / kind.test_list[0][0]
    raw = pickle.loads(test_file.read_bytes())
    pixels = torch.as_tensor(raw["data"][1]).view(3, 32, 32) / 255
    mean = torch.tensor(data._CIFAR_MEAN).view(3, 1, 1)
    deviation = torch.tensor(data._CIFAR_DEVIATION).view(3, 1, 1)
    torch.testing.assert_close(image, (pixels - mean) / deviation)
    assert label == raw.get("labels", raw.get("fine_labels"))[1]


def test_cifar_training_images_are_shifted_and_mirrored_reproducibly(tmp_path: Path) -> None:
    write_cifar(tmp_path, torchvision.datasets.CIFAR10)
    images = load_cifar(tmp_path, verify=False)
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        draws.append([images.train[0][0] for _ in range(4)])
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))
    assert any(not torch.equal(draws[0][0], other) for other in draws[0][1:])


@pytest.mark.parametrize(("name", "kind"), [kind[:2] for kind in KINDS])
def test_files_without_the_published_checksum_are_refused_unless_asked_for(
    tmp_path: Path, name: str, kind: type[torchvision.datasets.CIFAR10]
) -> None:
    write_cifar(tmp_path, kind)
    with pytest.raises(RuntimeError, match=r"damaged.*unpack the archive anew.*verify=False"):
        load_cifar(tmp_path, name)
    assert len(load_cifar(tmp_path, name, verify=False).held_out) == PER_FILE


def test_a_missing_folder_is_named_with_all_its_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_cifar(tmp_path / "nowhere", "cifar10")
    message = str(caught.value)
    assert str(tmp_path / "nowhere" / "cifar-10-batches-py") in message
    for file in ("data_batch_1", "data_batch_5", "test_batch", "batches.meta"):
        assert file in message


def test_a_single_missing_file_is_named(tmp_path: Path) -> None:
    (write_cifar(tmp_path, torchvision.datasets.CIFAR100) / "meta").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks meta; it must hold train, test, meta"):
        load_cifar(tmp_path, "cifar100", verify=False)


def test_an_unknown_data_set_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'mnist'; give one of 'cifar10', 'cifar100'"):
        load_cifar(tmp_path, "mnist")


def test_digits_are_normalized_images_of_ten_classes() -> None:
    images = load_digits()
    pixels, labels = images.train.tensors
    assert pixels.shape == (1438, 1, 32, 32)
    assert len(images.held_out) == 359
    assert pixels.dtype == torch.float32
    assert labels.unique().tolist() == list(range(10))
    assert abs(pixels.mean().item()) < 1e-4
    assert abs(pixels.std().item() - 1) < 1e-4
    assert (images.num_classes, images.in_channels) == (10, 1)


def test_digits_are_split_the_same_way_each_time_and_leave_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    first, second, other = load_digits(size=8), load_digits(size=8), load_digits(size=8, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.train.tensors[0], second.train.tensors[0])
    assert not torch.equal(first.held_out.tensors[1], other.held_out.tensors[1])


def test_both_sets_together_are_all_digits() -> None:
    images = load_digits(size=8)
    together = torch.cat([images.train.tensors[1], images.held_out.tensors[1]])
    assert len(together) == 1797
    # The counts by class that scikit-learn documents for the whole set.
    assert together.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_share_that_leaves_nothing_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        load_digits(held_out=share)
