"""The page in a real browser: it obeys keys and pointer, hostile text does nothing, nothing is asked of the network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from forkrl.report import Page as SomePage
from forkrl.report import Section, write_page, write_run_report
from tests.chromium import chromium, current, log, needs_chromium, open_page, phone
from tests.fabricated_run import response_row, write_rollouts, write_run

pytestmark = needs_chromium

HOSTILE = [
    "</script><img src=x onerror='window.__pwned=1'>",
    "<script>window.__pwned=1</script>",
    "\u2028window.__pwned=1//",
    "\x1b[31m\x00\u202e",
    "${window.__pwned=1}{{7*7}}",
    "javascript:window.__pwned=1",
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_report(
        write_run(tmp_path_factory.mktemp("report") / "run", steps=20, planned_steps=20, problems=30)
    )


def test_page_runs_without_errors_or_requests(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page)
    assert len(browser.find_elements(By.CSS_SELECTOR, "#responses .t")) > 200
    assert len(browser.find_elements(By.CSS_SELECTOR, "#responses .t.s")) > 40
    assert len(browser.find_elements(By.CSS_SELECTOR, ".plot svg")) == 8
    assert log(browser, "browser") == []
    sent = [
        entry["message"] for entry in log(browser, "performance") if "Network.requestWillBeSent" in entry["message"]
    ]
    assert len(sent) == 1, "the page itself, and nothing more"
    assert page.as_uri() in sent[0]


def test_keys_go_from_fork_to_fork(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page)
    forks = browser.execute_script(
        "const all = [...document.querySelectorAll('#responses .t')];"
        "return all.flatMap((t, i) => t.classList.contains('s') ? [i] : [])"
    )
    visited = []
    for key in ("n", "n", Keys.ARROW_RIGHT, "p", Keys.ARROW_LEFT):
        browser.switch_to.active_element.send_keys(key)
        visited.append(current(browser))
    assert visited == [forks[0], forks[1], forks[2], forks[1], forks[0]]
    tip = browser.find_element(By.ID, "tip").text
    for fact in ("nats", "probability", "position\n1 of", "selected\nyes"):
        assert fact in tip
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert current(browser) == -1
    assert not browser.find_element(By.ID, "tip").is_displayed()


def test_next_fork_goes_on_past_what_is_drawn(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page)
    cards = browser.find_elements(By.CSS_SELECTOR, ".problem")
    drawn = [card for card in cards if card.find_elements(By.CSS_SELECTOR, ".t")]
    assert 0 < len(drawn) < len(cards) == 12
    last = drawn[-1].find_elements(By.CSS_SELECTOR, ".t.fork")[-1]
    browser.execute_script("arguments[0].click()", last)
    browser.switch_to.active_element.send_keys("n")
    held = browser.execute_script("return document.querySelector('.t.now').closest('.problem')")
    assert held == cards[len(drawn)]


def test_pointer_and_tap_show_a_token(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page)
    token = browser.find_elements(By.CSS_SELECTOR, "#responses .t")[1]
    webdriver.ActionChains(browser).move_to_element(token).perform()
    tip = browser.find_element(By.ID, "tip")
    assert "position\n2 of" in tip.text
    token.click()
    assert current(browser) == 1
    token.click()
    assert current(browser) == -1


def test_theme_button_switches(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page)

    def look() -> list[str]:
        script = """
            const style = (node) => getComputedStyle(node);
            const hot = [...document.querySelectorAll(".t.s")].find((token) => !token.classList.contains("e0"));
            return [
                style(document.body).backgroundColor,
                style(document.body).color,
                style(document.querySelector(".plot text")).fill,
                style(hot).backgroundColor,
            ];"""
        return list(browser.execute_script(script))

    before = look()
    browser.find_element(By.ID, "theme").click()
    after = look()
    assert all(a != b for a, b in zip(before, after, strict=True))
    browser.find_element(By.ID, "theme").click()
    assert look() == before


def test_training_view_has_a_step_selector(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page)
    browser.find_element(By.XPATH, "//*[@id='views']/button[2]").click()
    steps = browser.find_elements(By.CSS_SELECTOR, "#frames button")
    assert [step.text for step in steps] == ["1", "10", "20"]
    before = browser.find_element(By.ID, "responses").text
    steps[2].click()
    assert browser.find_element(By.ID, "responses").text != before
    assert "advantage" in browser.find_element(By.ID, "responses").text


def test_phone_page_does_not_scroll_sideways(browser: webdriver.Chrome, page: Path) -> None:
    with phone(browser):
        open_page(browser, page)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360


def test_hostile_text_is_inert_and_visible(browser: webdriver.Chrome, tmp_path: Path) -> None:
    run = write_run(tmp_path / "<img src=x onerror=window.__pwned=1>", steps=0, planned_steps=5, problems=1)
    row = response_row(HOSTILE, [1.0, 0.0, 0.5, 0.2, 0.1, 2.0], prompt=HOSTILE[0] + HOSTILE[3], prompt_id=HOSTILE[1])
    write_rollouts(run / "rollouts/eval-000000.parquet", [row])
    config = run / "config.toml"
    config.write_text(config.read_text("utf-8") + 'command = "<img src=x onerror=window.__pwned=1>"\n', "utf-8")
    open_page(browser, write_run_report(run))
    for key in "nnnn":
        browser.switch_to.active_element.send_keys(key)
    assert browser.execute_script("return typeof window.__pwned") == "undefined"
    assert browser.find_elements(By.CSS_SELECTOR, "img, iframe, object, #responses script") == []
    shown = browser.execute_script("return [...document.querySelectorAll('#responses .t')].map(t => t.textContent)")
    assert shown == [HOSTILE[0], HOSTILE[1], "⟨U+2028⟩window.__pwned=1//", "␛[31m␀⟨U+202E⟩", HOSTILE[4], HOSTILE[5]]
    assert log(browser, "browser") == []


def plot_text_pixels(browser: webdriver.Chrome) -> float:
    """Height of the smallest text in a plot, as it is on the screen."""
    script = """return Math.min(...[...document.querySelectorAll(".plot text")].map((text) =>
        parseFloat(getComputedStyle(text).fontSize) * Math.hypot(text.getScreenCTM().a, text.getScreenCTM().b)));"""
    return float(browser.execute_script(script))


def test_text_in_plots_is_at_least_11_pixels_high(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page)
    assert plot_text_pixels(browser) >= 11
    with phone(browser):
        open_page(browser, page)
        assert plot_text_pixels(browser) >= 11


def test_a_wide_table_scrolls_in_its_own_box(browser: webdriver.Chrome, tmp_path: Path) -> None:
    columns = {f"a long name of column {number}": ["a sentence of several words"] * 30 for number in range(12)}
    table = Section("T", "C.", "t", pd.DataFrame(columns))
    with phone(browser):
        open_page(browser, write_page(tmp_path / "page.html", SomePage("p", "k", "v", [table])))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
        width, height = browser.execute_script("""
            const box = document.querySelector(".scroll");
            return [box.scrollWidth / box.clientWidth, box.scrollHeight / box.clientHeight];""")
    assert width > 3, "columns are not squeezed"
    assert height > 1
