"""Settings for all tests."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Tiny networks gain nothing from a second thread, and lose much where tests run side by side.
torch.set_num_threads(1)

# The first example may compile a kernel; how long things take is for benchmarks.
settings.register_profile("ckptsched", deadline=None)
settings.load_profile("ckptsched")


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has an empty cache of plans: none reads or writes the user's."""
    folder = tmp_path / "cache_of_plans"
    monkeypatch.setenv("CKPTSCHED_CACHE", str(folder))
    return folder
