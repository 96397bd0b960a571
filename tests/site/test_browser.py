"""The built site as a reader sees it, in a headless Chromium."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 800}
N_TABS = 4


class Visit:
    """One open page and what went wrong on it.

    Attributes:
        page: playwright's.
        errors: messages on the console, uncaught exceptions and failed requests.
        outside: addresses of other servers that were asked for.
    """

    def __init__(self, context: Any, address: str) -> None:
        self.errors: list[str] = []
        self.outside: list[str] = []
        self.page = context.new_page()
        self._context, self._address = context, address
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("requestfailed", self._miss)
        self.page.on(
            "response", lambda answer: answer.status < 400 or self.errors.append(f"{answer.status}: {answer.url}")
        )
        self.page.on("request", self._see)

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def _miss(self, request: Any) -> None:
        # A page that is left gives up what it still asks for.
        if request.failure != "net::ERR_ABORTED":
            self.errors.append(f"failed: {request.url}")

    def _see(self, request: Any) -> None:
        if not request.url.startswith((self._address, "data:", "blob:")):
            self.outside.append(request.url)

    def tab(self) -> "Visit":
        """Another page of the same window."""
        return Visit(self._context, self._address)

    def go(self, path: str, until: str = "load") -> Any:
        self.page.goto(f"{self._address}/{path}", wait_until=until)
        return self.page


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Callable[..., Visit]]:
    contexts = []

    def open_context(size: dict[str, int] = WIDE, scheme: str = "light") -> Visit:
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme))
        return Visit(contexts[-1], address)

    yield open_context
    for context in contexts:
        context.close()


def overflow(page: Any) -> int:
    """By how many pixels a page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def brightness(page: Any) -> float:
    """Of the background, from 0 for black to 1 for white."""
    return page.evaluate(
        """() => {
            const canvas = document.createElement("canvas").getContext("2d");
            canvas.fillStyle = getComputedStyle(document.body).backgroundColor;
            canvas.fillRect(0, 0, 1, 1);
            const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data;
            return (r + g + b) / 765;
        }"""
    )


def test_every_page_loads_without_an_error_or_a_request_to_others_and_fits_a_narrow_window(
    visit: Any, pages: list[str]
) -> None:
    opened = visit(NARROW)
    tabs = [opened.tab() for _ in range(N_TABS)]
    titles = []
    for first in range(0, len(pages), N_TABS):
        shown = list(zip(tabs, pages[first : first + N_TABS], strict=False))
        # A page is quiet when nothing was loaded for half a second: some of them wait at once.
        for tab, path in shown:
            tab.go(path, until="commit")
        for tab, path in shown:
            tab.page.wait_for_load_state("networkidle")
            assert tab.page.locator("h1").first.is_visible(), path
            assert overflow(tab.page) <= 0, path
            titles.append(tab.page.title())
            assert (tab.errors, tab.outside) == ([], []), path
    assert len(set(titles)) == len(titles), "two pages with one title"


def test_an_error_and_a_request_to_others_are_noticed(visit: Any) -> None:
    opened = visit()
    page = opened.go("index.html")
    page.evaluate("console.error('planted')")
    page.evaluate("fetch('http://127.0.0.2:9/planted').catch(() => {})")
    page.wait_for_timeout(200)
    assert "planted" in opened.errors
    assert opened.outside == ["http://127.0.0.2:9/planted"]


def test_the_navigation_opens_in_a_narrow_window(visit: Any) -> None:
    page = visit(NARROW).go("index.html")
    link = page.locator("nav.md-nav--primary").get_by_text("Guides", exact=True).first
    assert not link.is_visible() or link.bounding_box()["x"] < 0
    page.locator("label.md-header__button[for=__drawer]").click()
    page.wait_for_timeout(500)
    assert link.bounding_box()["x"] >= 0


def test_the_search_finds_an_option(visit: Any) -> None:
    opened = visit()
    page = opened.go("index.html", until="networkidle")
    page.locator(".md-search__button").first.click()
    page.wait_for_timeout(300)
    page.keyboard.type("max_grad_norm")
    found = page.locator("a[href*='guides/step']", has_text="max_grad_norm").first
    found.wait_for(state="visible", timeout=10_000)
    found.click()
    page.wait_for_url("**/guides/step.html*")
    assert (opened.errors, opened.outside) == ([], [])


@pytest.mark.parametrize("path", ["numerics.html", "reference/optimizers.html"])
def test_formulas_are_laid_out_in_two_dimensions(visit: Any, path: str) -> None:
    page = visit().go(path)
    fractions = page.locator("math mfrac")
    assert fractions.count() > 0
    above, below = fractions.first.evaluate("f => [...f.children].map(c => c.getBoundingClientRect().top)")
    assert above < below, "the numerator stands above the denominator"


@pytest.mark.parametrize(("scheme", "is_light"), [("light", True), ("dark", False)])
def test_the_site_is_light_or_dark_as_the_system_is(visit: Any, scheme: str, is_light: bool) -> None:
    page = visit(scheme=scheme).go("index.html")
    assert (brightness(page) > 0.5) == is_light


def test_the_first_page_says_above_the_fold_how_to_begin(visit: Any, tmp_path: Path) -> None:
    page = visit().go("index.html")
    for shown in (page.locator("h1").first, page.locator("main pre").first):
        box = shown.bounding_box()
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= WIDE["height"]
    assert "from dragon.vm.torch.optim import" in page.locator("main pre").first.inner_text()
    loaded = page.evaluate("[...document.images].map(image => image.naturalWidth > 0)")
    assert all(loaded), "a picture is missing"
    assert len(page.screenshot(path=str(tmp_path / "first.png"))) > 20_000
