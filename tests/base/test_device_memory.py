"""Budgets by what a device has free: what is read, what is reserved, what is refused by name."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ckptsched.base import device_memory
from ckptsched.base.budget import Budget, is_of_device, parse_budget
from ckptsched.base.device_memory import available_bytes, bytes_beside
from ckptsched.base.errors import BudgetSyntaxError

GIB = 2**30


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine that says what the files in a folder say, and has no CUDA device."""
    monkeypatch.setattr(device_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(device_memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(device_memory, "_cuda", lambda: None)
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:    8388608 kB\n")
    return tmp_path


@pytest.fixture
def cuda(machine: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Two CUDA devices, on which the allocator holds a GiB and uses a quarter of it."""
    found = SimpleNamespace(
        device_count=lambda: 2,
        current_device=lambda: 1,
        mem_get_info=lambda index: ((4 + index) * GIB, 16 * GIB),
        memory_reserved=lambda index: GIB,
        memory_allocated=lambda index: GIB // 4,
    )
    monkeypatch.setattr(device_memory, "_cuda", lambda: found)
    return found


def test_the_cpu_has_what_the_system_says(machine: Path) -> None:
    assert available_bytes("cpu") == available_bytes() == 8 * GIB
    assert available_bytes(torch.device("cpu")) == 8 * GIB


def test_a_container_has_what_its_limit_leaves(machine: Path) -> None:
    (machine / "memory.max").write_text(f"{2 * GIB}\n")
    (machine / "memory.current").write_text(f"{GIB // 2}\n")
    assert available_bytes("cpu") == 3 * GIB // 2
    (machine / "memory.max").write_text("max\n")
    assert available_bytes("cpu") == 8 * GIB


def test_a_system_without_the_file_is_asked_another_way(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machine / "meminfo").unlink()
    sizes = {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert available_bytes("cpu") == 4_096_000
    monkeypatch.delattr(os, "sysconf")
    with pytest.raises(BudgetSyntaxError, match=r"does not say .* free; give bytes"):
        available_bytes("cpu")


def test_this_machine_has_something_free() -> None:
    assert available_bytes("cpu") > 0


def test_cuda_has_what_is_free_and_what_the_allocator_holds(cuda: SimpleNamespace) -> None:
    assert available_bytes("cuda:0") == 4 * GIB + 3 * GIB // 4
    assert available_bytes() == available_bytes("cuda") == 5 * GIB + 3 * GIB // 4
    assert parse_budget("50% of cuda:0") == Budget(bytes=(4 * GIB + 3 * GIB // 4) // 2)
    assert parse_budget("50% of the GPU").bytes == (5 * GIB + 3 * GIB // 4) // 2


@pytest.mark.parametrize("device", ["cuda:2", "cuda:x", "mps", "tpu", "cuda:-1"])
def test_a_device_that_is_not_there(cuda: SimpleNamespace, device: str) -> None:
    with pytest.raises(BudgetSyntaxError, match='"90% of cpu"'):
        Budget.device(device)
    with pytest.raises(BudgetSyntaxError, match='"90% of cpu"'):
        parse_budget(f"90% of {device}")


def test_cuda_without_a_device(machine: Path) -> None:
    with pytest.raises(BudgetSyntaxError, match="'cuda' is not there: torch finds 0"):
        parse_budget("90% of cuda")


@given(share=st.integers(1, 100), free=st.integers(2**10, 2**50))
def test_a_share_of_a_device_is_rounded_down(share: int, free: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_memory, "_cpu_bytes", lambda: free)
        found = parse_budget(f"{share}% of the cpu")
    assert found.bytes == share * free // 100


def test_texts_that_name_a_device(machine: Path) -> None:
    assert parse_budget(" 25 % of  the Device ") == Budget(bytes=2 * GIB)
    assert is_of_device("25% of cpu")
    assert not is_of_device("25%")
    assert parse_budget("25% of storing everything") == parse_budget("25%")
    assert not is_of_device("25% of storing everything")


@pytest.mark.parametrize(
    "text", ["0% of cpu", "101% of cpu", "1.2.3% of cpu", "90% of", "% of cpu"]
)
def test_bad_shares_of_a_device(machine: Path, text: str) -> None:
    with pytest.raises(BudgetSyntaxError):
        parse_budget(text)


@pytest.mark.parametrize("share", [0.0, -1, 1.01, True, float("nan")])
def test_a_share_is_above_none_and_up_to_all(machine: Path, share: Any) -> None:
    with pytest.raises(BudgetSyntaxError, match="above 0 and up to 1"):
        Budget.device("cpu", share=share)


def test_what_is_on_the_device_is_taken_already(cuda: SimpleNamespace) -> None:
    net = nn.BatchNorm1d(1000)  # two parameters and two buffers of 4000 bytes, and a counter
    batch = {"x": [torch.zeros(10, 100)], "y": (torch.zeros(3, dtype=torch.int64), None)}
    assert bytes_beside("cpu", net, None, batch) == dict.fromkeys(
        ("parameters and buffers", "optimizer state", "batch"), 0
    )
    there = bytes_beside("cuda", net, "adamw", batch)
    assert there == {"parameters and buffers": 16_008, "optimizer state": 16_000, "batch": 4024}
    free = 5 * GIB + 3 * GIB // 4
    budget = Budget.device(model=net, optimizer="adamw", batch=batch, share=1, reserved_bytes=5)
    assert budget == Budget(bytes=free, reserved_bytes=16_008 + 16_000 + 4024 + 5)


@pytest.mark.parametrize(
    ("make", "copies"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
        (lambda p: torch.optim.RMSprop(p), 1),
        (lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True), 3),
        (lambda p: torch.optim.Rprop(p), 2),
        (lambda p: torch.optim.Adadelta(p), 2),
        (lambda p: torch.optim.Adam(p), 2),
        (lambda p: torch.optim.Adam(p, amsgrad=True), 3),
        (lambda p: torch.optim.Adamax(p), 2),
        (lambda p: torch.optim.NAdam(p), 2),
        (lambda p: torch.optim.RAdam(p), 2),
        (lambda p: torch.optim.ASGD(p), 1),
        (lambda p: torch.optim.AdamW(p), 2),
    ],
)
def test_optimizers_keep_what_is_reserved(make: Any, copies: int) -> None:
    net = nn.Linear(300, 200)
    net.bias.requires_grad_(False)
    optimizer = make(net.parameters())
    reserved = bytes_beside("cpu", net, optimizer)["optimizer state"]
    assert reserved == copies * net.weight.numel() * 4
    net(torch.randn(2, 300)).sum().backward()
    optimizer.step()
    state = [x for one in optimizer.state.values() for x in one.values() if x is not None]
    kept = sum(x.numel() * x.element_size() for x in state if isinstance(x, torch.Tensor))
    assert reserved <= kept <= reserved + 64  # counters of steps besides
    assert bytes_beside("cpu", net, optimizer)["optimizer state"] == (0 if state else reserved)


def test_a_state_that_is_there_is_taken_already() -> None:
    net = nn.Linear(3, 2)
    optimizer = torch.optim.Adagrad(net.parameters())  # which makes it at once
    assert bytes_beside("cpu", net, optimizer)["optimizer state"] == 0
    assert bytes_beside("cpu", net, "adagrad")["optimizer state"] == 32


def test_optimizers_by_bytes_and_by_name(machine: Path) -> None:
    net = nn.Linear(3, 2)
    assert bytes_beside("cpu", None, 77)["optimizer state"] == 77
    assert bytes_beside("cpu", net, "SGD with momentum")["optimizer state"] == 32
    with pytest.raises(BudgetSyntaxError, match=r"'shampoo' keeps is not known.* adamw"):
        Budget.device("cpu", model=net, optimizer="shampoo")
    with pytest.raises(BudgetSyntaxError, match="'LBFGS' keeps is not known"):
        Budget.device("cpu", optimizer=torch.optim.LBFGS(net.parameters()))
    with pytest.raises(BudgetSyntaxError, match="give model= as well"):
        Budget.device("cpu", optimizer="adam")
    with pytest.raises(BudgetSyntaxError, match="-1 bytes cannot be reserved"):
        Budget.device("cpu", optimizer=-1)


def test_nothing_left_names_what_takes_it(machine: Path) -> None:
    with pytest.raises(
        BudgetSyntaxError, match=r"8\.000 GiB that cpu has free .* batch 9\.000 GiB"
    ):
        Budget.device("cpu", batch=9 * GIB)
