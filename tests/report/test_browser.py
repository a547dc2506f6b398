"""The pages in a real browser: drawn, without a complaint or a request, alive under the mouse, and no wider than a phone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import secateur
from secateur.report.measured import TASKS, note_measured
from secateur.report.page import PAGE, write_run_page

pytest.importorskip("playwright")
from playwright.sync_api import Page, sync_playwright

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here; install it to look at the pages"),
    pytest.mark.usefixtures("same_process"),
    pytest.mark.pages,
]

WIDTHS = (1280, 390)
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield started
        started.close()


@pytest.fixture
def look(browser: Any) -> Iterator[Open]:
    """Open a page, wait until it is drawn, and at the end see that it neither complained nor asked for anything."""
    said: list[str] = []
    opened = []

    def do(file: Path, width: int = 1280, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        page = context.new_page()
        opened.append(context)
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request",
            lambda request: request.url == page.url or request.is_navigation_request() or said.append(request.url),
        )
        page.goto(file.resolve().as_uri())
        page.wait_for_selector("body[data-drawn]", timeout=30_000)
        return page

    yield do
    for context in opened:
        context.close()
    assert said == []


@pytest.fixture(scope="module")
def once() -> Callable[..., Path]:
    """Folders that are only looked at: made by the first test that asks, in its own folder, for those after it."""
    made: dict[Callable[..., Path], Path] = {}

    def do(make: Callable[..., Path], *places: Path) -> Path:
        if make not in made:
            made[make] = make(*places)
        return made[make]

    return do


@pytest.fixture
def recovered(once: Callable[..., Path], llama_folder: Path, windows_file: Path, tmp_path: Path) -> Path:
    return once(_recovered, llama_folder, windows_file, tmp_path)


def _recovered(llama_folder: Path, windows_file: Path, tmp_path: Path) -> Path:
    secateur.prune(str(llama_folder), tmp_path / "cut", unit="head,channel", ratio=0.5, calibration=str(windows_file))
    secateur.recover(tmp_path / "cut", tmp_path / "tuned", data=str(windows_file), steps=3, batch_size=2)
    secateur.evaluate([str(llama_folder), str(tmp_path / "cut"), str(tmp_path / "tuned")], text=str(windows_file))
    return tmp_path / "tuned"


@pytest.fixture
def compared(once: Callable[..., Path], llama_folder: Path, windows_file: Path, tmp_path: Path) -> Path:
    return once(_compared, llama_folder, windows_file, tmp_path)


def _compared(llama_folder: Path, windows_file: Path, tmp_path: Path) -> Path:
    text = tmp_path / "held-out.safetensors"
    save_file({"input_ids": torch.randint(128, (4, 24), generator=torch.Generator().manual_seed(9))}, text)
    recipes = ["wanda unit=2:4", "magnitude unit=weight", "taylor unit=channel ratio=0.5"]
    secateur.compare(str(llama_folder), recipes, tmp_path / "compared", text=str(text), calibration=str(windows_file))
    return tmp_path / "compared"


@pytest.fixture
def one_task(llama_folder: Path, windows_file: Path, tmp_path: Path) -> Path:
    """A run with one task of which three models have scores."""
    secateur.prune(str(llama_folder), tmp_path / "cut", unit="channel", ratio=0.5, calibration=str(windows_file))
    score = {"value": 0.5, "standard_error": 0.1}
    models = {
        name: {"scores": {"piqa": {"acc": score}}, "means": {"acc": score}, "kept": {}}
        for name in ("model", "cut", "tuned")
    }
    tasks = {"models": models, "questions": {"piqa": 20}, "protocol": "as asked"}
    note_measured(tmp_path / "cut", TASKS, tasks | {"roles": {"own": "cut", "dense": "model"}})
    return write_run_page(tmp_path / "cut")


def no_wider_than_itself(page: Page, width: int) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth") <= width)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_recovered_run_is_drawn(width, scheme, recovered, look):
    page = look(recovered / PAGE, width, color_scheme=scheme)
    charts = page.locator(".chart svg")
    assert charts.count() == page.locator(".chart").count() == int(page.get_attribute("body", "data-drawn")) >= 4
    for place in range(charts.count()):
        assert charts.nth(place).locator(".role-mark path, .role-mark line").count() > 0
        box, holder = charts.nth(place).bounding_box(), page.locator(".chart").nth(place).bounding_box()
        assert box["width"] <= holder["width"] + 1
    assert no_wider_than_itself(page, width)
    ground, ink = page.evaluate("['backgroundColor', 'color'].map((of) => getComputedStyle(document.body)[of])")
    darker = [sum(map(int, found.removeprefix("rgb(").removesuffix(")").split(","))) for found in (ground, ink)]
    assert (darker[0] < darker[1]) == (scheme == "dark")
    words = page.evaluate("getComputedStyle(document.querySelector('.chart svg text')).fill")
    assert (sum(map(int, words.removeprefix("rgb(").removesuffix(")").split(","))) > 384) == (scheme == "dark")


def test_a_cell_tells_its_numbers_when_it_is_pointed_at(recovered, look):
    page = look(recovered / PAGE)
    page.locator(".chart").first.locator(".mark-rect.role-mark path").first.hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    told = page.locator("#vg-tooltip-element").inner_text()
    for word in ("block", "removed", "of", "50.00%"):
        assert word in told


@pytest.mark.parametrize("width", WIDTHS)
def test_one_task_has_a_lane_a_model_below_the_legend(width, one_task, look):
    page = look(one_task, width)
    chart = page.locator("[data-spec=tasks] svg")
    points = chart.locator(".mark-symbol.role-mark path")
    middles = sorted(box["y"] + box["height"] / 2 for box in (points.nth(n).bounding_box() for n in range(3)))
    assert min(below - above for above, below in pairwise(middles)) >= 12
    legend = chart.locator(".role-legend").first.bounding_box()
    assert legend["y"] + legend["height"] <= middles[0]


@pytest.mark.parametrize("width", WIDTHS)
def test_code_is_wrapped_and_wide_tables_show_that_they_go_on(width, compared, look):
    page = look(next((compared / "recipes").glob(f"*/{PAGE}")), width)
    assert page.locator("pre").count() > 0
    assert page.evaluate("[...document.querySelectorAll('pre')].every((code) => code.scrollWidth <= code.clientWidth)")
    assert "gradient" in page.evaluate("getComputedStyle(document.querySelector('.wide')).backgroundImage")


def test_on_paper_it_is_light_and_complete(recovered, look):
    page = look(recovered / PAGE, color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf(format="A4").startswith(b"%PDF")


@pytest.mark.parametrize("width", WIDTHS)
def test_a_comparison_sorts_and_leads_to_its_recipes(width, compared, look):
    page = look(compared / PAGE, width)
    assert no_wider_than_itself(page, width)

    def column(place: int) -> list[str]:
        return page.locator(f"table.sortable tbody tr td:nth-child({place})").evaluate_all(
            "cells => cells.map((cell) => cell.dataset.value)"
        )

    head = page.get_by_role("button", name="perplexity")
    head.click()
    rising = [float(value) for value in column(2)]
    assert rising == sorted(rising)
    assert page.locator("th[aria-sort=ascending]").count() == 1
    head.click()
    assert [float(value) for value in column(2)] == rising[::-1]
    page.get_by_role("button", name="time").click()
    assert column(8)[-1] == ""  # the dense model has none, whichever way it is sorted
    page.get_by_role("button", name="time").focus()
    page.keyboard.press("Enter")
    assert column(8)[-1] == ""
    page.get_by_role("link", name="wanda").click()
    page.wait_for_selector("body[data-drawn]")
    assert page.locator("h1").inner_text() == "wanda unit=2:4"
    assert "seed-0.safetensors" not in "".join(
        page.locator("table").all_inner_texts()
    )  # it says what the windows were cut from
    page.get_by_role("link", name="All recipes").click()
    page.wait_for_selector("table.sortable")


def test_a_point_leads_to_its_recipe(compared, look):
    page = look(compared / PAGE)
    page.locator(".chart").first.locator(".mark-symbol.role-mark path").first.click()
    page.wait_for_url("**/recipes/**")
    page.wait_for_selector("body[data-drawn]")
