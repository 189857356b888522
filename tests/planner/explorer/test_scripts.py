"""Functions of the page's script, file by file: they say figures as ckptsched says them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Page

from ckptsched.base.budget import format_bytes, format_seconds
from ckptsched.planner.explorer.content import packed
from ckptsched.planner.explorer.page import SCRIPTS, asset
from tests.planner.explorer.browser import chromium


@pytest.fixture(scope="module")
def scripts() -> Iterator[Page]:
    """A page with the functions of all files but the last, which begins."""
    with chromium() as browser:
        page = browser.new_page()
        page.add_script_tag(content="\n".join(asset(name) for name in SCRIPTS[:-1]))
        yield page
        page.close()


def test_bytes_are_rounded_as_elsewhere(scripts: Page) -> None:
    draw = random.Random(5)
    sizes = [draw.randrange(2 ** draw.randrange(1, 46)) for _ in range(500)]
    sizes += [0, 1, 1023, 1024, 1025, 2**20 - 1, 2**20, 2**30, 2**30 + 1]
    for budget in (False, True):
        code = f"sizes => sizes.map(size => bytesText(size, {{budget: {str(budget).lower()}}}))"
        expected = [format_bytes(size, budget=budget) for size in sizes]
        assert scripts.evaluate(code, sizes) == expected


def test_seconds_are_rounded_as_elsewhere(scripts: Page) -> None:
    draw = random.Random(6)
    seconds = [draw.random() * 10 ** draw.randrange(-9, 4) for _ in range(500)] + [0.0]
    expected = [format_seconds(x) for x in seconds]
    assert scripts.evaluate("all => all.map(secondsText)", seconds) == expected


def test_what_is_packed_is_unpacked(scripts: Page) -> None:
    data: dict[str, Any] = {"names": ["ü", "</script>", "\u2028"], "size": [2**52, 0, -1, 0.125]}
    assert scripts.evaluate("text => unpack(text)", packed(data)) == data
    assert packed(data) == packed(data)


@pytest.mark.parametrize("largest", [0, 0.007, 1, 3.2, 99, 12345.6])
def test_marks_of_an_axis_are_round_and_in_it(scripts: Page, largest: float) -> None:
    found = scripts.evaluate("largest => ticks(largest, 5)", largest)
    assert found[0] == 0
    assert found == sorted(found)
    assert all(x <= largest * (1 + 1e-9) for x in found)
    if largest:
        assert 3 <= len(found) <= 7


def test_marks_of_a_logarithmic_axis_are_in_it(scripts: Page) -> None:
    for least, largest in ((0.5, 60), (0.03, 400), (12, 13)):
        found = scripts.evaluate("([a, b]) => logTicks(a, b)", [least, largest])
        assert all(least <= x <= largest for x in found)
        assert found == sorted(found)
        assert len(found) >= 2 or largest / least < 2
