"""Budgets: what people write, what it means, how bytes are printed."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsched.base.budget import (
    Budget,
    Link,
    Tier,
    exact_bytes,
    format_bytes,
    format_seconds,
    parse_budget,
)
from ckptsched.base.errors import BudgetSyntaxError, CkptschedError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("512", 512),
        ("512B", 512),
        ("512 bytes", 512),
        ("1k", 1000),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("512MiB", 512 * 2**20),
        ("512 mib", 512 * 2**20),
        ("1.5 GB", 1_500_000_000),
        ("1.5GiB", 3 * 2**29),
        ("2TiB", 2**41),
        ("1e9", 10**9),
        ("1e3 MB", 10**9),
        ("  2 M ", 2_000_000),
        ("+3", 3),
        ("1_000", 1000),
        ("1.9", 1),
        ("0.0005 MB", 500),
    ],
)
def test_texts(text: str, size: int) -> None:
    assert parse_budget(text) == Budget(bytes=size)


@pytest.mark.parametrize(("value", "size"), [(1, 1), (2**50, 2**50), (1.9, 1), (1e9, 10**9)])
def test_numbers(value: float, size: int) -> None:
    assert parse_budget(value) == Budget(bytes=size)


@pytest.mark.parametrize(
    ("text", "share"), [("40%", "0.4"), ("12.5 %", "0.125"), ("150%", "1.5"), ("0.1%", "0.001")]
)
def test_shares(text: str, share: str) -> None:
    assert parse_budget(text) == Budget(share=Fraction(share))


@pytest.mark.parametrize(
    "number", [1e6, np.float32(1e6), np.float64(1e6), np.int64(10**6), np.uint32(10**6)]
)
def test_numbers_of_numpy_are_numbers(number: float) -> None:
    assert parse_budget(number) == Budget(bytes=10**6)


def test_a_share_is_of_what_storing_everything_needs() -> None:
    assert parse_budget("40%").resolve(1000) == 400
    assert parse_budget("33.3%").resolve(1000) == 333
    assert parse_budget("10%").resolve(99) == 9
    assert parse_budget(70).resolve(1000) == 70


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("12 parsecs", "unknown unit 'parsecs' (known: B, kB, MB"),
        ("", "the budget '' cannot be read"),
        ("MiB", "cannot be read"),
        ("1.2.3", "holds no number"),
        ("1__0", "holds no number"),
        ("nan", "cannot be read"),
        ("inf", "cannot be read"),
        ("0", "'0' is not positive"),
        ("0.4", "less than one byte; if 40% was meant, give '40%'"),
        ("-1GiB", "is not positive"),
        ("0%", "is not positive"),
        ("-5%", "is not positive"),
        (0, "a budget of 0 bytes is not positive"),
        (-7, "a budget of -7 bytes is not positive"),
        (0.5, "less than one byte; if 50% was meant, give '50%'"),
        (np.float32(0.5), "less than one byte; if 50% was meant, give '50%'"),
        (Fraction(1, 2), "less than one byte; if 50% was meant, give '50%'"),
        (np.float16(math.nan), "a budget of nan bytes is not a finite number"),
        (np.bool_(True), "cannot be read from bool"),
        (math.nan, "a budget of nan bytes is not a finite number"),
        (math.inf, "not a finite number"),
        (-math.inf, "not a finite number"),
        (None, "cannot be read from NoneType None"),
        (True, "cannot be read from bool True"),
        ([1], "cannot be read from list"),
        ("1e", "unknown unit 'e'"),
    ],
)
def test_the_rest_is_refused_with_a_remedy(budget: object, message: str) -> None:
    with pytest.raises(BudgetSyntaxError) as caught:
        parse_budget(budget)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert '"512MiB", "1.5 GB" or "40%"' in str(caught.value)
    assert isinstance(caught.value, CkptschedError)
    assert isinstance(caught.value, ValueError)


@given(st.text(max_size=20) | st.floats() | st.integers())
def test_anything_is_a_budget_or_a_budget_error(value: object) -> None:
    try:
        budget = parse_budget(value)  # type: ignore[arg-type]
    except BudgetSyntaxError:
        return
    assert budget.resolve(10**12) >= 0


@given(st.integers(1, 2**60))
def test_printed_sizes_round_up_and_budgets_down(size: int) -> None:
    up, down = format_bytes(size), format_bytes(size, budget=True)
    high, low = parse_budget(up).bytes, parse_budget(down).bytes
    assert high is not None
    assert low is not None
    assert low <= size
    # Reading back rounds fractions of a byte down, so a size may come back one byte short.
    assert high + 1 >= size
    assert high - low <= max(1, size // 1000 + 1)


@given(st.integers(1, 2**60))
def test_plain_numbers_survive(size: int) -> None:
    assert parse_budget(str(size)) == parse_budget(size) == parse_budget(f"{size} B")
    assert parse_budget(parse_budget(size)) == Budget(bytes=size)


def test_printing() -> None:
    assert format_bytes(0) == "0 B"
    assert format_bytes(1023) == "1023 B"
    assert format_bytes(1024) == "1.000 KiB"
    assert format_bytes(1025) == "1.001 KiB"
    assert format_bytes(1025, budget=True) == "1.000 KiB"
    assert format_bytes(3 * 2**29) == "1.500 GiB"
    assert format_bytes(-1025) == "-1.000 KiB"
    assert format_bytes(10**400).endswith(" GiB")
    assert format_seconds(0) == "0 s"
    assert format_seconds(1.5) == "1.500 s"
    assert format_seconds(0.0123) == "12.300 ms"
    assert format_seconds(4.2e-5) == "42.000 us"
    assert format_seconds(5e-9) == "5.000 ns"


def test_a_total_takes_off_what_is_reserved() -> None:
    budget = Budget.total("1GiB", reserved_bytes=2**29)
    assert budget.resolve(10**12) == 2**29
    with pytest.raises(BudgetSyntaxError, match="leaves nothing after 2147483648 reserved"):
        Budget.total("1GiB", reserved_bytes=2**31)
    with pytest.raises(BudgetSyntaxError, match="a total needs bytes, found '40%'"):
        Budget.total("40%", reserved_bytes=1)


def test_a_budget_is_bytes_or_a_share() -> None:
    for options in (
        {},
        {"bytes": 3, "share": Fraction(1, 2)},
        {"bytes": 0},
        {"share": Fraction(0)},
    ):
        with pytest.raises(BudgetSyntaxError, match="give a positive number"):
            Budget(**options)


def test_a_link_takes_latency_and_bandwidth() -> None:
    assert Link(bytes_per_second=100.0, latency_seconds=0.5).seconds(250) == 3.0
    assert [tier.name for tier in Tier] == ["DEVICE", "HOST", "DISK"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Budget(bytes=float("nan")), "bytes of a budget must be a whole number, found nan"),
        (lambda: Budget(bytes=10.7), "must be a whole number, found 10.7"),
        (lambda: Budget(bytes="64MiB"), "must be a whole number, found '64MiB'"),
        (lambda: Budget(bytes=True), "must be a whole number, found True"),
        (lambda: Budget(bytes=-3), "a budget of -3 bytes is not positive"),
        (lambda: Budget(), "a budget is bytes or a share, found bytes=None, share=None"),
        (lambda: Budget(share=0.5), "a share must be a Fraction, found 0.5"),
        (lambda: Budget(share=Fraction(1, 2), reserved_bytes=5), "5 bytes cannot be reserved"),
        (lambda: Budget.total(10, reserved_bytes=-5), "-5 bytes cannot be reserved: 0 or more"),
        (lambda: Budget.total(10, reserved_bytes=10), "leaves nothing after 10 reserved bytes"),
        (lambda: Budget.total("40%", reserved_bytes=10), "a total needs bytes, found '40%'"),
    ],
)
def test_budgets_that_are_made_by_hand_are_checked(
    make: Callable[[], Budget], message: str
) -> None:
    with pytest.raises(BudgetSyntaxError) as caught:
        make()
    assert message in str(caught.value)


def test_integers_of_numpy_are_budgets() -> None:
    assert parse_budget(np.int64(9)) == Budget(bytes=9)


@given(st.integers(0, 2**60), st.booleans())
def test_exact_bytes_say_the_number_once(size: int, budget: bool) -> None:
    text = exact_bytes(size, budget=budget)
    assert text.startswith(format_bytes(size, budget=budget))
    assert text.count(str(size)) == 1
