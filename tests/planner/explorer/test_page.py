"""The explorer's page in a browser: it asks for nothing, and shows what the plans say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from ckptsched.base.budget import format_bytes, format_seconds
from ckptsched.planner.plan import Plan
from ckptsched.planner.plan_words import certificate_of
from ckptsched.planner.planner import plan_each, plan_one
from ckptsched.planner.tapes import tapes_of
from ckptsched.planner.tradeoff import Measured, Tradeoff, tradeoff
from ckptsched.schedule.language import Backward, Drop, Forward
from ckptsched.simulator.simulator import live_during
from ckptsched.workload.stage import Stage
from tests.planner.explorer.browser import Opened, chromium
from tests.support.graphs import residual
from tests.support.small_chains import mixed_chain, uniform_chain

LISTED = 10  # of what is live


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def found() -> Tradeoff:
    """A trade-off of which one plan was measured."""
    made = tradeoff(mixed_chain("three blocks"), 6, cache=False)
    measured = Measured(
        peak_bytes=made.rows[1].plan.peak_bytes - 4096,
        seconds=1.25,
        plain_seconds=1.0,
        max_gradient_difference=0.0,
        ok=True,
    )
    rows = list(made.rows)
    rows[1] = replace(rows[1], measured=measured)
    return replace(made, rows=tuple(rows))


@pytest.fixture(scope="module")
def file(found: Tradeoff, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "tradeoff.html"
    found.to_html(path)
    return path


@pytest.fixture
def opened(browser: Browser, file: Path) -> Iterator[Opened]:
    page = Opened(browser, file, viewport={"width": 1280, "height": 900})
    yield page
    assert page.faults == []
    assert page.requests == [file.as_uri()]
    page.page.close()


def shown_plan(opened: Opened, found: Tradeoff) -> Plan:
    return found.rows[int(opened.page.get_attribute("body", "data-plan") or "-1")].plan


def test_the_figures_are_those_of_the_plan(opened: Opened, found: Tradeoff) -> None:
    plan = shown_plan(opened, found)
    assert found.knee is not None
    assert plan is found.knee.plan
    figures = opened.pairs("#figures")
    assert figures["Projected peak"].startswith(format_bytes(plan.peak_bytes))
    assert figures["Budget"].startswith(format_bytes(plan.budget_bytes, budget=True))
    assert figures["Step"].startswith(format_seconds(plan.seconds))
    assert figures["Overhead"].startswith(f"+{100 * plan.overhead:.1f} %")
    assert figures["Runs again"].startswith(f"{plan.forwards - len(plan.chain)}\n")
    assert figures["From the best"].startswith(f"{100 * plan.gap:.2f} %")
    assert format_bytes(plan.store_all_bytes) in figures["Store all"]
    assert format_bytes(plan.least_budget_bytes) in figures["Store all"]
    lines = opened.page.locator("#certificate li").all_inner_texts()
    assert lines == certificate_of(plan)


def walk(opened: Opened, plan: Plan) -> None:
    """Go through all operations by keys, and compare each with the plan."""
    seen: set[int] = set()
    opened.press("Home")
    for p, operation in enumerate(plan.schedule):
        words = opened.value_text()
        assert words.startswith(f"Operation {p + 1}: ")
        assert words.endswith(f", {format_bytes(int(plan.trace.timeline[p]))}")
        pairs = opened.pairs("#details")
        live = live_during(plan.chain, plan.schedule, p)
        own = [x.bytes for x in live if x.name == "the operation itself"]
        assert pairs["bytes"] == format_bytes(int(plan.trace.timeline[p]))
        assert pairs["of its own"] == format_bytes(sum(own))
        rows = opened.page.locator("#details .living li").all_inner_texts()
        sizes = [row.split("\n")[-1] for row in rows]
        assert sizes[:LISTED] == [format_bytes(x.bytes) for x in live[:LISTED]]
        if isinstance(operation, (Forward, Backward)):
            assert plan.chain.stage_name(operation.stage) in words
        if isinstance(operation, Forward):
            assert ("run again" in words) == (operation.stage in seen)
            seen.add(operation.stage)
        if isinstance(operation, Drop):
            assert "Drop" in words
        opened.press("ArrowRight")
    assert opened.value_text().startswith(f"Operation {len(plan.schedule)}: ")  # there is no more


def test_every_operation_says_what_the_simulator_says(opened: Opened, found: Tradeoff) -> None:
    walk(opened, shown_plan(opened, found))


def test_a_graph_has_a_page(browser: Browser, tmp_path: Path) -> None:
    plan = plan_one(residual(2), "70%", cache=False)
    plan.to_html(tmp_path / "graph.html")
    opened = Opened(browser, tmp_path / "graph.html")
    walk(opened, plan)
    assert not opened.page.is_visible("#front-section")
    assert not opened.page.is_visible("#budget")
    assert opened.faults == []


def test_keys_lead_to_the_peak_and_to_what_runs_again(opened: Opened, found: Tradeoff) -> None:
    plan = shown_plan(opened, found)
    opened.press("Home")
    opened.press("p")
    assert f"Operation {plan.trace.peak_position + 1}:" in opened.value_text()
    assert "peak of the step" in opened.text("#details")
    opened.press("Home")
    opened.press("r")
    first = opened.value_text()
    assert "run again" in first
    opened.page.click("#to-again")
    assert "run again" in opened.value_text()
    assert opened.value_text() != first


def test_zoom_and_pan(opened: Opened, found: Tradeoff) -> None:
    count = len(shown_plan(opened, found).schedule)
    assert opened.view() == (0, count)
    opened.press("+")
    opened.press("+")
    near = opened.view()
    assert near[1] - near[0] < 0.5 * count
    opened.press("-")
    assert opened.view()[1] - opened.view()[0] > near[1] - near[0]
    opened.press("+")
    box = opened.page.locator("#chart").bounding_box()
    assert box is not None
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 3
    before, picked = opened.view(), opened.value_text()
    opened.page.mouse.move(*middle)
    opened.page.mouse.down()
    opened.page.mouse.move(middle[0] + 150, middle[1], steps=5)
    opened.page.mouse.up()
    assert opened.view()[0] < before[0]
    opened.page.mouse.move(2, 2)
    assert opened.value_text() == picked  # a drag picks nothing
    opened.press("End")  # out of sight: the view follows
    assert opened.view()[1] == pytest.approx(count)
    opened.page.click("#zoom-all")
    assert opened.view() == (0, count)


def test_the_pointer_shows_an_operation_and_a_click_keeps_it(
    opened: Opened, found: Tradeoff
) -> None:
    plan = shown_plan(opened, found)
    box = opened.page.locator("#chart").bounding_box()
    assert box is not None
    left, right = 64, 14  # the chart's margins
    at = 5.5 / len(plan.schedule)
    x = box["x"] + left + at * (box["width"] - left - right)
    before = opened.value_text()
    opened.page.mouse.move(x, box["y"] + 80)
    assert opened.value_text().startswith("Operation 6: ")
    opened.page.mouse.move(2, 2)
    assert opened.value_text() == before
    opened.page.mouse.click(x, box["y"] + 80)
    opened.page.mouse.move(2, 2)
    assert opened.value_text().startswith("Operation 6: ")


def test_seconds_add_up_to_the_plans(opened: Opened, found: Tradeoff) -> None:
    opened.page.check('input[name="axis"][value="seconds"]', force=True)
    assert opened.view()[0] == 0
    assert opened.view()[1] == pytest.approx(shown_plan(opened, found).seconds, rel=1e-9)


def test_another_budget_changes_everything(opened: Opened, found: Tradeoff) -> None:
    for k, row in enumerate(found.rows):
        opened.page.select_option("#budget", str(k))
        opened.page.wait_for_selector(f"body[data-plan='{k}']")
        plan = row.plan
        assert opened.pairs("#figures")["Projected peak"].startswith(format_bytes(plan.peak_bytes))
        assert opened.view() == (0, len(plan.schedule))
        assert f"Operation {plan.trace.peak_position + 1}:" in opened.value_text()
        assert opened.page.is_visible("#measured table") == (row.measured is not None)
        assert format_bytes(plan.budget_bytes, budget=True) in opened.value_text("#front")
        assert format_bytes(plan.peak_bytes) in opened.text("#live")
    opened.press("Home", "#front")
    opened.page.wait_for_selector("body[data-plan='0']")
    opened.press("ArrowRight", "#front")
    opened.page.wait_for_selector("body[data-plan='1']")
    opened.page.click("#front circle[data-plan='3']")
    opened.page.wait_for_selector("body[data-plan='3']")
    assert opened.page.input_value("#budget") == "3"


def test_projected_stands_beside_measured(opened: Opened, found: Tradeoff) -> None:
    opened.page.select_option("#budget", "1")
    opened.page.wait_for_selector("body[data-plan='1']")
    measured = found.rows[1].measured
    assert measured is not None
    rows = opened.page.locator("#measured tbody tr").all_inner_texts()
    plan = found.rows[1].plan
    sizes = (format_bytes(plan.peak_bytes), format_bytes(measured.peak_bytes))
    assert rows[0].split("\t") == ["peak", *sizes]
    assert rows[1].split("\t") == ["step", format_seconds(plan.seconds), "1.250 s"]
    assert "+25.0 %" in rows[2]
    assert rows[-1].split("\t")[-1] == "yes"


def test_the_front_has_all_its_marks(opened: Opened, found: Tradeoff) -> None:
    assert opened.page.locator("#front .point").count() == len(found.rows)
    assert opened.page.locator("#front .knee").count() == 1
    assert opened.page.locator("#front .whole").count() == 1
    most = 1.2 * max(found.rows[-1].plan.budget_bytes, found.rows[-1].plan.store_all_bytes)
    near = [x for x in found.baselines if x.peak_bytes <= most and x.name != "store_all"]
    assert opened.page.locator("#front .baseline").count() == len(near)
    box = opened.page.locator("#front svg").bounding_box()
    assert box is not None
    for text in opened.page.locator("#front text").all():
        inner = text.bounding_box()
        assert inner is not None
        assert inner["x"] >= box["x"] - 1
        assert inner["x"] + inner["width"] <= box["x"] + box["width"] + 1


def test_the_table_is_that_of_the_plan(opened: Opened, found: Tradeoff) -> None:
    plan = shown_plan(opened, found)
    tapes = tapes_of(plan.chain, plan.schedule)
    for tape in tapes:
        row = opened.page.locator(f"#network [data-stage='{tape.stage}'] > span")
        cells = row.all_inner_texts()
        stage: Stage = plan.chain.stages[tape.stage - 1]
        assert cells[1] == plan.chain.stage_name(tape.stage)
        assert cells[2] == format_seconds(stage.forward_seconds)
        assert cells[3] == format_seconds(stage.backward_seconds)
        assert cells[4] == format_bytes(stage.state_bytes)
        assert cells[5] == format_bytes(stage.tape_bytes)
        assert cells[7] == str(tape.runs)
        assert ("kept" in cells[8]) == tape.is_kept


def test_the_table_is_sorted_searched_and_linked(opened: Opened, found: Tradeoff) -> None:
    plan = shown_plan(opened, found)
    names = "#network .body .row:not(.block) > :nth-child(2)"
    opened.page.fill("#search", "block1")
    shown = opened.page.locator(names).all_inner_texts()
    assert shown == [plan.chain.stage_name(i) for i in range(5, 9)]
    assert "4 of 12" in opened.text("#live")
    opened.page.fill("#search", "")
    opened.page.uncheck("#by-block")
    opened.page.click("#network .head button:text-is('forward')")
    sorted_names = opened.page.locator(names).all_inner_texts()
    longest = max(x.forward_seconds for x in plan.chain.stages)
    assert sorted_names[0] == plan.chain.stage_name(9)
    assert plan.chain.stages[8].forward_seconds == longest
    heading = opened.page.locator("#network [role=columnheader]").nth(2)
    assert heading.get_attribute("aria-sort") == "descending"
    opened.page.click("#network [data-stage='7']")
    assert plan.chain.stage_name(7) in opened.value_text()
    opened.press("ArrowRight")
    chosen = opened.page.locator("#network .chosen")
    assert chosen.count() == 1
    number = int(chosen.get_attribute("data-stage") or 0)
    assert plan.chain.stage_name(number) in opened.value_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1600])
def test_it_fits_screens_of_all_widths(
    browser: Browser, file: Path, width: int, scheme: str
) -> None:
    opened = Opened(
        browser,
        file,
        viewport={"width": width, "height": 900},
        color_scheme=scheme,
    )
    assert opened.width() == width
    is_dark = "document.documentElement.classList.contains('dark')"
    assert opened.page.evaluate(is_dark) == (scheme == "dark")
    opened.page.click("#theme")
    assert opened.page.evaluate(is_dark) != (scheme == "dark")
    assert opened.faults == []
    opened.page.close()


def test_who_does_not_see_it_is_told(opened: Opened) -> None:
    for selector, role in (("#chart", "slider"), ("#front", "slider"), ("#live", "status")):
        assert opened.page.get_attribute(selector, "role") == role
    bare = """[...document.querySelectorAll('button, input, select, [tabindex="0"]')]
        .filter((x) => !(x.ariaLabel || x.innerText || x.labels?.length)).map((x) => x.outerHTML)"""
    assert opened.page.evaluate(bare) == []
    low, value, high = (
        int(opened.page.get_attribute("#chart", f"aria-value{x}") or 0)
        for x in ("min", "now", "max")
    )
    assert low <= value <= high


def test_names_of_modules_are_never_read_as_html(browser: Browser, tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)><!--STYLE-->"
    chain = uniform_chain(4, name=evil)
    stages = tuple(replace(stage, name=f"{evil}&amp;") for stage in chain.stages)
    plan = plan_one(replace(chain, stages=stages), "100%", cache=False)
    plan.to_html(tmp_path / "evil.html")
    opened = Opened(browser, tmp_path / "evil.html")
    assert opened.text("#title") == evil
    assert opened.page.locator("img").count() == 0
    assert f"{evil}&amp;" in opened.text("#details")
    assert opened.faults == []
    assert len(opened.requests) == 1


def test_long_chains_stay_small_and_usable(browser: Browser, tmp_path: Path) -> None:
    chain = uniform_chain(1000)
    plans = plan_each(chain, [f"{k}%" for k in range(5, 105, 5)], solver="revolve", cache=False)
    rows = [plan for plan in plans if isinstance(plan, Plan)]
    assert len(rows) == 20
    found = tradeoff(chain, [x.budget_bytes for x in rows], solver="revolve", cache=False)
    path = tmp_path / "long.html"
    found.to_html(path)
    assert path.stat().st_size <= 2**20
    longer = uniform_chain(10_000)
    plan = plan_one(longer, "5%", solver="revolve", cache=False)
    plan.to_html(tmp_path / "longer.html")
    opened = Opened(browser, tmp_path / "longer.html")
    # Of the table only what is in sight is there.
    assert opened.page.locator("#network .row").count() < 100
    opened.page.fill("#search", "[9876]")
    assert re.search(r"\b1 of 10,000", opened.text("#network-count"))
    opened.page.click("#network [data-stage='9877']")
    assert plan.chain.stage_name(9877) in opened.value_text()
    opened.press("p")
    assert format_bytes(plan.peak_bytes) in opened.value_text()
    opened.press("+")
    assert opened.view()[1] - opened.view()[0] < len(plan.schedule)
    assert opened.faults == []
