"""The web page, in a browser: a Chromium on the path, or in $CHROMIUM."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from playwright import sync_api as playwright

from deploy.images_api import Limits

CHROMIUM = os.environ.get("CHROMIUM") or next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
if CHROMIUM is None:
    pytest.skip("there is no Chromium on the path, nor in $CHROMIUM", allow_module_level=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM)


@pytest.fixture(params=[(1280, 800), (390, 844)], ids=["desktop", "phone"])
def page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page on which nothing may go wrong unseen."""
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text) if "Security" in message.text else None)
    page.on("request", lambda asked: troubles.append(asked.url) if "127.0.0.1" not in asked.url
            and not asked.url.startswith(("data:", "blob:")) else None)  # fmt: skip
    page.set_default_timeout(10_000)
    yield page
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
    page.close()
    assert troubles == []


def paint(page: Any, prompt: str = "a red circle") -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Paint").click()


def test_picture_is_painted_shown_and_downloaded(page: Any, make_server: Any) -> None:
    page.goto(make_server().address)
    page.get_by_label("Pictures", exact=True).and_(page.locator("input")).fill("2")
    page.get_by_label("Seed").fill("5")
    page.get_by_label("Not in the picture").fill("green")
    paint(page)
    playwright.expect(page.locator("figure")).to_have_count(2)
    newest = page.locator("figure").first
    playwright.expect(newest).to_contain_text("64 × 64 · 4 steps · guidance 3 · seed 6")
    assert newest.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
    with page.expect_download() as begun:
        newest.get_by_role("link", name="Download").click()
    assert begun.value.suggested_filename == "a-red-circle-6.png"
    with Image.open(io.BytesIO(begun.value.path().read_bytes())) as image:
        assert image.size == (64, 64)
    newest.get_by_role("button", name="Use these settings").click()
    assert page.get_by_label("Seed").input_value() == "6"
    paint(page, "a star")
    playwright.expect(page.locator("figure")).to_have_count(3)


def test_progress_is_shown_and_a_picture_can_be_cancelled(page: Any, make_server: Any) -> None:
    server = make_server(held=True)
    page.goto(server.address)
    paint(page)
    server.allow(2)
    playwright.expect(page.locator("#doing")).to_have_text("step 2 of 4")
    assert page.get_by_role("progressbar").evaluate("bar => bar.value") == 0.5
    page.get_by_role("button", name="Cancel").click()
    playwright.expect(page.get_by_role("progressbar")).to_be_hidden()
    server.wait_for_outcome("disconnected")
    assert page.locator("figure").count() == 0
    assert page.get_by_role("alert").is_hidden()


def test_errors_are_shown_in_plain_words(page: Any, make_server: Any) -> None:
    server = make_server(held=True, limits=Limits(queue=0))
    page.goto(server.address)
    with server.painting():
        paint(page)
        playwright.expect(page.get_by_role("alert")).to_contain_text("Many are waiting already.")
    server.stop()
    paint(page)
    playwright.expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached")


def test_page_asks_for_the_token(page: Any, make_server: Any) -> None:
    page.goto(make_server(token="0123456789abcdef").address)
    page.get_by_label("Token").fill("not the one, to be sure")
    page.get_by_role("button", name="Go on").click()
    playwright.expect(page.get_by_role("alert")).to_contain_text("token is missing or wrong")
    page.get_by_label("Token").fill("0123456789abcdef")
    page.get_by_role("button", name="Go on").click()
    paint(page)
    playwright.expect(page.locator("figure")).to_have_count(1)


def test_every_control_has_a_name(page: Any, make_server: Any) -> None:
    page.goto(make_server().address)
    playwright.expect(page.get_by_role("button", name="Paint")).to_be_enabled()
    for control in page.locator("textarea, input, button").all():
        assert control.evaluate("of => (of.labels?.[0] ?? of).textContent.trim()"), control
