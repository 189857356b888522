"""A tiny folder in the format of CIFAR's python version, for tests."""

import pickle
from pathlib import Path

import numpy as np
import torchvision

PER_FILE = 3


def write_cifar(root: Path, kind: type[torchvision.datasets.CIFAR10]) -> Path:
    """Write files with the names, keys, dtypes and pickle protocol of the published ones.

    Args:
        root: An existing folder.
        kind: torchvision's class for CIFAR-10 or CIFAR-100.

    Returns:
        The folder below `root` that holds the files, with `PER_FILE` images in each.
    """
    folder = root / kind.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    hundred = kind is torchvision.datasets.CIFAR100
    classes = 100 if hundred else 10
    for file, _ in (*kind.train_list, *kind.test_list):
        labels = rng.integers(classes, size=PER_FILE).tolist()
        content = {"data": rng.integers(256, size=(PER_FILE, 3072), dtype=np.uint8)}
        if hundred:
            content |= {"fine_labels": labels, "coarse_labels": [0] * PER_FILE}
        else:
            content |= {"labels": labels}
        (folder / file).write_bytes(pickle.dumps(content, protocol=2))
    names = {kind.meta["key"]: [f"class {label}" for label in range(classes)]}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(names, protocol=2))
    return folder
