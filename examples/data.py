"""Images to train on: scikit-learn's digits, which need no download, and CIFAR from a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset
from torchvision import transforms

# Mean and standard deviation of each channel as the paper's training script has them; those of
# CIFAR-100 are close enough to share.
_CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
_CIFAR_DEVIATION = (0.2023, 0.1994, 0.2010)

_CIFAR: dict[str, type[torchvision.datasets.CIFAR10]] = {
    "cifar10": torchvision.datasets.CIFAR10,
    "cifar100": torchvision.datasets.CIFAR100,
}


@dataclass(frozen=True, kw_only=True)
class Images:
    """Two sets of pairs of a float32 image (channels, height, width) and an int label."""

    train: Dataset[Any]
    held_out: Dataset[Any]
    num_classes: int
    in_channels: int


def load_digits(size: int = 32, held_out: float = 0.2, seed: int = 0) -> Images:
    """Load the 1797 handwritten digits of scikit-learn, scaled up from 8x8 pixels.

    Args:
        size: Height and width of the images, in pixels.
        held_out: Share of the images that is kept for testing, between 0 and 1.
        seed: Picks which ones; the same seed gives the same split on every machine.

    Returns:
        One channel, ten classes, mean 0 and deviation 1 over the training images.
    """
    from sklearn import datasets

    if not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out}; give a share between 0 and 1, such as 0.2")
    digits = datasets.load_digits()
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    images = functional.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order.tensor_split([round(held_out * len(labels))])
    images = (images - images[train].mean()) / images[train].std()
    return Images(
        train=TensorDataset(images[train], labels[train]),
        held_out=TensorDataset(images[test], labels[test]),
        num_classes=10,
        in_channels=1,
    )


def load_cifar(root: str | Path, name: str = "cifar10", *, verify: bool = True) -> Images:
    """Load CIFAR-10 or CIFAR-100 from a folder; nothing is downloaded.

    Training images are shifted by up to 4 pixels and mirrored at random, as in the paper.

    Args:
        root: The folder that holds `cifar-10-batches-py` or `cifar-100-python`, as they lie in
            the archives "CIFAR-10 python version" and "CIFAR-100 python version".
        name: "cifar10" or "cifar100".
        verify: Whether the files must have the published checksums; False reads a subset made
            by hand, too. The files are pickles: read only those of people you trust.

    Returns:
        Three channels of 32x32 pixels, 10 or 100 classes.

    Raises:
        ValueError: There is no such data set.
        FileNotFoundError: A file is missing.
        RuntimeError: A file is not what its checksum says.
    """
    if name not in _CIFAR:
        raise ValueError(f"unknown data set {name!r}; give one of {', '.join(map(repr, _CIFAR))}")
    kind = _CIFAR[name] if verify else _without_checksums(_CIFAR[name])
    _check_files(kind, name, Path(root))
    normalize = [transforms.ToTensor(), transforms.Normalize(_CIFAR_MEAN, _CIFAR_DEVIATION)]
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    try:
        train = kind(root, train=True, transform=transforms.Compose([*augment, *normalize]))
        test = kind(root, train=False, transform=transforms.Compose(normalize))
    except RuntimeError as error:
        raise RuntimeError(
            f"{name} in the folder {Path(root) / kind.base_folder} is damaged: torchvision says "
            "that a file does not have the published checksum; unpack the archive anew, or load "
            "with verify=False if the files are your own"
        ) from error
    return Images(train=train, held_out=test, num_classes=len(train.classes), in_channels=3)


def _check_files(kind: type[torchvision.datasets.CIFAR10], name: str, root: Path) -> None:
    """Say what torchvision's one sentence leaves out: where it looked, and for what."""
    folder = root / kind.base_folder
    needed = [file for file, _ in (*kind.train_list, *kind.test_list)] + [kind.meta["filename"]]
    missing = [file for file in needed if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{name} was looked for in the folder {folder}, which lacks {', '.join(missing)}; "
            f"it must hold {', '.join(needed)}, the python version of the archive from "
            f"{kind.url}, unpacked in {root}"
        )


def _without_checksums(
    kind: type[torchvision.datasets.CIFAR10],
) -> type[torchvision.datasets.CIFAR10]:
    """The same data set, read in the same way; torchvision takes None for "do not check"."""
    return type(
        kind.__name__,
        (kind,),
        {
            "train_list": [[file, None] for file, _ in kind.train_list],
            "test_list": [[file, None] for file, _ in kind.test_list],
            "meta": {**kind.meta, "md5": None},
        },
    )
