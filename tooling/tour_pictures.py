"""Draws the pictures of docs/tour.md: the explorer's page of a small GPT-2, in a real browser.

    python -m tooling.tour_pictures

Needs Chromium (`apt-get install -y chromium`) and writes docs/figures/explorer-*.png, light
and dark. Seconds are of the machine that it runs on, bytes are the same everywhere.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from playwright.sync_api import Page, sync_playwright
from transformers import GPT2Config, GPT2LMHeadModel

import ckptsched as cs

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
PICTURES = {
    "front": "div.pair",
    "network": "section:has(#network-heading)",
    "timeline": "section:has(#timeline-heading)",
}
BUDGET_BYTES = 66 * 2**20  # shown is the plan of the largest budget that is no larger


def write_page(path: Path) -> None:
    """Plan the model of docs/start.md for many budgets, and write the explorer's page."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=6, n_embd=128, n_head=4, vocab_size=1024, use_cache=False)
    gpt, tokens = GPT2LMHeadModel(config), torch.randint(1024, (8, 128))
    chain = cs.profile(gpt, tokens, kwargs={"labels": tokens})
    cs.tradeoff(chain).to_html(path)


def choose_budget(page: Page) -> None:
    """Show the plan of the largest budget up to BUDGET_BYTES."""
    texts = page.locator("#budget option").all_inner_texts()
    fitting = [
        number
        for number, text in enumerate(texts)
        if cs.parse_budget(text.partition(",")[0]).bytes <= BUDGET_BYTES
    ]
    page.select_option("#budget", index=max(fitting))


def main() -> None:
    """Write the pictures."""
    path = shutil.which("chromium") or sys.exit("apt-get install -y chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "tradeoff.html"
        write_page(file)
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(color_scheme=scheme, viewport={"width": 1280, "height": 1000})
            page.goto(file.as_uri())
            page.wait_for_selector("body[data-ready=yes]", timeout=60_000)
            choose_budget(page)
            for name, selector in PICTURES.items():
                if name == "timeline":
                    page.press("#chart", "p")  # the peak; it would scroll the table as well
                ending = "" if scheme == "light" else "-dark"
                page.locator(selector).screenshot(path=FIGURES / f"explorer-{name}{ending}.png")
        browser.close()


if __name__ == "__main__":
    main()
