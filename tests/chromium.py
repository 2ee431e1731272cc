"""Headless Chromium for the tests that look at a page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="needs the programs chromium and chromedriver on PATH to look at the page"
)


@contextmanager
def chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    """A browser of 1280 × 1000 pixels; its logs say what a page complained of and asked of the network."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
        "window-size=1280,1000",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=CHROMEDRIVER))
    driver.set_page_load_timeout(60)
    try:
        yield driver
    finally:
        driver.quit()


def log(browser: webdriver.Chrome, name: str) -> list[dict[str, str]]:
    """Entries since the last call."""
    return list(browser.get_log(name))  # type: ignore[no-untyped-call]


def open_page(browser: webdriver.Chrome, page: Path) -> None:
    log(browser, "browser")  # what an earlier page said is not ours
    log(browser, "performance")
    browser.get(page.as_uri())


def press(browser: webdriver.Chrome, *keys: str) -> None:
    """Type, wherever the focus is."""
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


@contextmanager
def phone(browser: webdriver.Chrome) -> Iterator[None]:
    """360 × 740 pixels, and fingers."""
    size = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def current(browser: webdriver.Chrome) -> int:
    """Index of the token in hand among all tokens shown, -1 for none."""
    script = "return [...document.querySelectorAll('#responses .t')].indexOf(document.querySelector('.t.now'))"
    return int(browser.execute_script(script))
