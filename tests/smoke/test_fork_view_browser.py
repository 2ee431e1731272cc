"""The fork view in a real browser: search, checkpoints, responses in turn, alternatives, branches, great length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from forkrl.report import Branch, ForkView, Frame, ShownPrompt, ShownResponse, View
from tests.chromium import chromium, log, needs_chromium, open_page, phone, press
from tests.fabricated_forks import WORDS, made_forks, made_page

pytestmark = needs_chromium
HOSTILE = "</script><img src=x onerror='window.__pwned=1'>\u2028\u202e\x1b[31m\x00\ud800${window.__pwned=1}{{7*7}}"
SHOWN = "</script><img src=x onerror='window.__pwned=1'>⟨U+2028⟩⟨U+202E⟩␛[31m␀⟨U+D800⟩${window.__pwned=1}{{7*7}}"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 problems with four responses each, three checkpoints."""
    forks = made_forks([[30, 40, 50, 60]] * 40, layers=("step 0", "step 20", "step 40"))
    return made_page(tmp_path_factory.mktemp("forks") / "page.html", forks)


def until(browser: webdriver.Chrome, true: Callable[[], object]) -> None:
    WebDriverWait(browser, 20, poll_frequency=0.05).until(lambda _: true())


def tip(browser: webdriver.Chrome) -> str:
    return browser.find_element(By.ID, "tip").text


def held(browser: webdriver.Chrome) -> dict[str, object]:
    """Text, place and look of the token in hand."""
    script = """
        const span = document.querySelector(".t.now"), box = span.getBoundingClientRect();
        const response = span.closest(".response"), problem = span.closest(".problem");
        return {
            text: span.textContent,
            index: [...response.querySelectorAll(".t")].indexOf(span),
            label: response.querySelector(".facts b").textContent,
            prompt: problem.querySelector(".prompt").textContent,
            ground: getComputedStyle(span).backgroundColor,
            seen: document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2) === span,
        };"""
    return dict(browser.execute_script(script))


def matches(browser: webdriver.Chrome) -> str:
    return browser.find_element(By.ID, "matches").text


def look_for(browser: webdriver.Chrome, text: str) -> None:
    press(browser, "/")
    assert browser.switch_to.active_element.get_attribute("id") == "search"
    press(browser, text)


def test_tip_shows_alternatives_and_marks_the_one_written(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page)
    press(browser, "n", "n")
    assert held(browser) | {"ground": ""} == {
        "text": " wait", "index": 11, "label": "Response 1", "prompt": "Problem 0", "ground": "", "seen": True,
    }  # fmt: skip
    rows = browser.find_elements(By.CSS_SELECTOR, "#tip .alternatives .line")
    assert [row.text.split() for row in rows] == [
        ["so", "50.0%"],
        ["wait", "30.0%"],
        ["but", "10.0%"],
        ["all", "others", "10.0%"],
    ]
    assert ["taken" in str(row.get_attribute("class")) for row in rows] == [False, True, False, False]
    bars = [row.find_element(By.CSS_SELECTOR, ".bar i").size["width"] for row in rows]
    assert bars[0] > bars[1] > bars[2] == bars[3] > 0
    for fact in ("1.000 nats", "rank\n2", "30.0%", "12 of 30"):
        assert fact in tip(browser)


def test_token_outside_its_alternatives_is_added_with_its_own_probability(
    browser: webdriver.Chrome, tmp_path: Path
) -> None:
    one = ShownResponse("r", ["rare"], [[2.0]], [-4.60517], ranks=[9], alternatives=[[("a", 0.5), ("b", 0.2)]])
    forks = ForkView([View("V", "", [Frame("", [ShownPrompt("p", "", [one])])])], "", 1.0)
    open_page(browser, made_page(tmp_path / "page.html", forks))
    press(browser, "n")
    taken = browser.find_element(By.CSS_SELECTOR, "#tip .taken")
    assert taken.text.split() == ["rare", "1.0%"]
    assert taken.get_attribute("title") == "written, rank 9"


@pytest.mark.parametrize(
    ("ranks", "marked"), [([2], [False, True, False]), ([3], [True, False, False]), ([], [True, False, False])]
)
def test_of_two_alternatives_that_look_alike_the_rank_tells(
    browser: webdriver.Chrome, tmp_path: Path, ranks: list[int], marked: list[bool]
) -> None:
    one = ShownResponse("r", ["a"], [[2.0]], [-1.0], ranks=ranks, alternatives=[[("a", 0.6), ("a", 0.3), ("b", 0.1)]])
    forks = ForkView([View("V", "", [Frame("", [ShownPrompt("p", "", [one])])])], "", 1.0)
    open_page(browser, made_page(tmp_path / "page.html", forks))
    press(browser, "n")
    rows = browser.find_elements(By.CSS_SELECTOR, "#tip .alternatives .line")
    assert ["taken" in str(row.get_attribute("class")) for row in rows] == marked


def test_branches_show_rate_interval_and_number(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page)
    press(browser, "b")
    assert held(browser)["index"] == 4
    rows = browser.find_elements(By.CSS_SELECTOR, "#tip .branches .line")
    assert [" ".join(row.text.split()) for row in rows] == [
        "so 50.0% 25% [10, 47] of 16",
        "wait 30.0% 75% [50, 90] of 16",
    ]
    whisker = rows[1].find_element(By.CSS_SELECTOR, ".bar b")
    track = rows[1].find_element(By.CSS_SELECTOR, ".bar")
    assert whisker.size["width"] == pytest.approx(0.4 * track.size["width"], abs=1)
    press(browser, "b")
    assert held(browser)["prompt"] == "Problem 1"
    press(browser, "B")
    assert held(browser)["prompt"] == "Problem 0"


def test_checkpoints_recolour_and_keep_the_token_in_hand(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page)
    press(browser, "n")
    before = held(browser)
    lines = [line.text for line in browser.find_elements(By.CSS_SELECTOR, "#tip .layers .line")]
    assert lines == ["step 0\n1.000", "step 20\n1.100", "step 40\n1.200"]
    press(browser, "]", "]", "]")
    after = held(browser)
    assert after | {"ground": ""} == before | {"ground": ""}
    assert after["ground"] != before["ground"]
    assert "entropy\n1.200 nats" in tip(browser)
    pressed = browser.find_elements(By.CSS_SELECTOR, "#layers [aria-pressed=true]")
    assert [button.text for button in pressed] == ["step 40"]
    browser.find_element(By.XPATH, "//*[@id='layers']/button[2]").click()
    assert "entropy\n1.100 nats" in tip(browser)
    press(browser, "[")
    assert held(browser) == before


def test_what_is_drawn_later_has_the_colours_of_the_checkpoint(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page)
    press(browser, "n", "]")
    near = held(browser)["ground"]
    press(browser, Keys.ESCAPE)  # a token in hand is kept in sight
    browser.execute_script("scrollTo(0, document.body.scrollHeight)")
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".problem:last-child .t.fork"))
    script = "return getComputedStyle(document.querySelector('.problem:last-child .t.fork')).backgroundColor"
    assert browser.execute_script(script) == near


def test_responses_to_a_prompt_take_turns(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page)
    card = browser.find_element(By.CSS_SELECTOR, ".problem")
    tabs = card.find_elements(By.CSS_SELECTOR, ".tabs button")
    assert [tab.text for tab in tabs] == ["1 ✓", "2 ✗", "3 ✓", "4 ✗"]
    assert len(card.find_elements(By.CSS_SELECTOR, ".response")) == 1
    tabs[2].click()
    assert "Response 3" in card.text
    press(browser, "n")
    assert held(browser)["label"] == "Response 3"
    press(browser, "j")
    assert "Response 4" in card.text
    press(browser, "j")  # there is no fifth
    assert [tab.get_attribute("aria-pressed") for tab in tabs] == ["false", "false", "false", "true"]
    press(browser, "k")
    assert "Response 3" in card.text


def test_two_responses_stand_side_by_side(browser: webdriver.Chrome, tmp_path: Path) -> None:
    open_page(browser, made_page(tmp_path / "page.html", made_forks([[20, 20]])))
    left, right = browser.find_elements(By.CSS_SELECTOR, ".response")
    assert left.location["y"] == right.location["y"]
    assert not browser.find_elements(By.CSS_SELECTOR, ".tabs")
    press(browser, *"nnnn")
    assert (held(browser)["label"], held(browser)["index"]) == ("Response 2", 4)


def test_search_finds_across_tokens_in_every_response(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page)
    look_for(browser, "WE add: Wait no.")
    until(browser, lambda: matches(browser) == str(40 * sum(n // 7 for n in (30, 40, 50, 60))))
    press(browser, Keys.ENTER)
    assert held(browser) | {"ground": ""} == {
        "text": " we", "index": 1, "label": "Response 1", "prompt": "Problem 0", "ground": "", "seen": True,
    }  # fmt: skip
    hit = [token.text for token in browser.find_elements(By.CSS_SELECTOR, ".t.hit")]
    assert "".join(hit).replace(" ", "") == "weadd:waitno.⏎"
    assert matches(browser) == "1 of 960"
    press(browser, *[Keys.ENTER] * 4)
    assert (held(browser)["label"], held(browser)["index"]) == ("Response 2", 1)
    press(browser, Keys.SHIFT + Keys.ENTER)
    assert (held(browser)["label"], held(browser)["index"]) == ("Response 1", 22)
    press(browser, Keys.NULL)


def test_search_reaches_what_is_not_drawn(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page)
    assert not browser.find_elements(By.CSS_SELECTOR, ".problem:last-child .t")
    look_for(browser, "so we")
    until(browser, lambda: matches(browser) != "")
    press(browser, Keys.SHIFT + Keys.ENTER, Keys.NULL)
    until(browser, lambda: bool(held(browser)["seen"]))
    found = held(browser)
    assert (found["prompt"], found["label"], found["index"]) == ("Problem 39", "Response 4", 56)


def test_search_crosses_line_breaks_and_takes_signs_as_they_are(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page)
    look_for(browser, "no. so")
    until(browser, lambda: matches(browser) != "")
    press(browser, Keys.ENTER)
    assert held(browser)["index"] == 5
    press(browser, Keys.ESCAPE)
    look_for(browser, ".*(")
    until(browser, lambda: matches(browser) == "none")


def test_escape_leaves_the_search(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page)
    look_for(browser, "npb]j wait")  # no letter typed here is a command
    until(browser, lambda: matches(browser) == "none")
    assert not browser.find_elements(By.CSS_SELECTOR, ".t.now")
    press(browser, Keys.ESCAPE)
    assert browser.find_element(By.ID, "search").get_attribute("value") == ""
    assert matches(browser) == ""
    press(browser, "n")
    assert held(browser)["index"] == 4


@pytest.fixture(scope="module")
def long_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_page(tmp_path_factory.mktemp("long") / "page.html", made_forks([[20_000]], layers=("base", "final")))


def test_twenty_thousand_tokens_draw_to_the_end_by_scrolling(browser: webdriver.Chrome, long_page: Path) -> None:
    open_page(browser, long_page)
    count = "return document.querySelectorAll('#responses .t').length"
    assert browser.execute_script(count) < 3000
    browser.set_script_timeout(60)
    browser.execute_async_script("""
        const done = arguments[0];
        const step = () => {
            const before = scrollY;
            scrollBy(0, 700);
            if (scrollY > before) requestAnimationFrame(step);
            else requestAnimationFrame(() => requestAnimationFrame(done));
        };
        step();""")
    texts = browser.execute_script("return [...document.querySelectorAll('#responses .t')].map((t) => t.textContent)")
    shown = [word.replace("\n", "⏎") for word in WORDS]
    assert texts == [shown[i % 7] for i in range(20_000)]
    assert log(browser, "browser") == []


def test_twenty_thousand_tokens_are_not_drawn_to_reach_the_last(browser: webdriver.Chrome, long_page: Path) -> None:
    open_page(browser, long_page)
    look_for(browser, "add")
    until(browser, lambda: matches(browser) == "2,857")
    press(browser, Keys.SHIFT + Keys.ENTER, Keys.NULL)
    assert held(browser)["seen"]
    assert "position\n19,995 of 20,000" in tip(browser)
    assert browser.execute_script("return document.querySelectorAll('#responses .t').length") < 6000


def test_print_has_every_token(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page)
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script("return document.querySelectorAll('#responses .t').length") == 12 * 30


def test_more_prompts_come_on_request(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page)
    for shown, left in ((12, "Show 12 more of 28"), (24, "Show 12 more of 16"), (36, "Show 4 more of 4")):
        assert len(browser.find_elements(By.CSS_SELECTOR, ".problem")) == shown
        button = browser.find_element(By.ID, "more")
        assert button.text == left
        browser.execute_script("arguments[0].click()", button)
    assert len(browser.find_elements(By.CSS_SELECTOR, ".problem")) == 40
    assert not browser.find_element(By.ID, "more").is_displayed()


def test_strip_over_a_long_response_leads_to_a_fork_there(browser: webdriver.Chrome, long_page: Path) -> None:
    open_page(browser, long_page)
    strip = browser.find_element(By.CSS_SELECTOR, ".strip")
    webdriver.ActionChains(browser).move_to_element(strip).click().perform()  # in its middle
    found = held(browser)
    assert (found["text"], found["seen"]) == (" wait", True)
    position = int(tip(browser).split("position\n")[1].split(" of")[0].replace(",", ""))
    assert abs(position - 10_000) < 200


def test_no_space_is_lost_or_added_between_blocks(browser: webdriver.Chrome, long_page: Path) -> None:
    open_page(browser, long_page)
    script = "return [...document.querySelectorAll('.block')].map((block) => block.textContent).filter(Boolean)"
    until(browser, lambda: len(browser.execute_script(script)) > 1)  # blocks are drawn as they come near
    blocks = browser.execute_script(script)
    assert all(block.endswith(".⏎\n") for block in blocks)
    assert "".join(blocks) == ("".join(WORDS).replace("\n", "⏎\n") * 3000)[: len("".join(blocks))]


def test_phone_shows_the_token_in_hand_above_its_numbers(browser: webdriver.Chrome, page: Path) -> None:
    with phone(browser):
        open_page(browser, page)
        for key in ("n", "n", "b", "n"):
            press(browser, key)
            assert held(browser)["seen"], key
            assert browser.find_element(By.ID, "tip").is_displayed()
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360


def test_dark_page_recolours_tokens_and_strip(browser: webdriver.Chrome, long_page: Path) -> None:
    def strip() -> str:
        return str(browser.execute_script("return document.querySelector('.strip').toDataURL()"))

    open_page(browser, long_page)
    press(browser, "n")
    light = (held(browser)["ground"], strip())
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    try:
        assert held(browser)["ground"] != light[0]
        until(browser, lambda: strip() != light[1])
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_hostile_text_is_inert_and_visible_everywhere(browser: webdriver.Chrome, tmp_path: Path) -> None:
    branches = {0: [Branch(HOSTILE, 0.5, 0.5, 0.4, 0.6, 8)]}
    responses = [
        ShownResponse(
            HOSTILE, [HOSTILE] * 2, [[1.0] * 2] * 2, [-1.0] * 2, (), [1] * 2, [[(HOSTILE, 0.9)]] * 2, branches
        )
        for _ in range(3)
    ]
    frames = [Frame(HOSTILE, [ShownPrompt(HOSTILE, outcome, responses) for outcome in (HOSTILE, "b")])] * 2
    forks = ForkView([View(HOSTILE, HOSTILE, frames, (HOSTILE, "b"), HOSTILE) for _ in "ab"], HOSTILE, 0.5)
    open_page(browser, made_page(tmp_path / "page.html", forks))
    press(browser, "n")
    seen = [tip(browser)]
    press(browser, "n", "]", "[")
    seen.append(tip(browser))
    for part in ("views", "layers", "frames", "outcomes", "view-note", "responses"):
        assert SHOWN in str(browser.find_element(By.ID, part).get_property("textContent")), part
    assert all(SHOWN in text for text in seen)
    look_for(browser, "</script><img src=x onerror='window.__pwned=1'>")
    press(browser, Keys.ENTER)
    assert matches(browser).endswith(" of 12")
    assert browser.execute_script("return typeof window.__pwned") == "undefined"
    assert browser.find_elements(By.CSS_SELECTOR, "img, iframe, object, #responses script, #tip script") == []
    assert log(browser, "browser") == []


def test_a_selected_token_with_a_leading_space_never_wraps_inside(browser: webdriver.Chrome, tmp_path: Path) -> None:
    words = [" wait", "ing", " for", ",", " the"] * 60
    one = ShownResponse("r", words, [[1.0] * 300], [-0.1] * 300, selected=[True] * 300)
    forks = ForkView([View("V", "", [Frame("", [ShownPrompt("p", "", [one])])])], "", None)
    open_page(browser, made_page(tmp_path / "page.html", forks))
    script = """
        document.querySelector(".tokens").style.width = arguments[0] + "px";
        const tokens = [...document.querySelectorAll(".t")], top = (token) => token.getBoundingClientRect().top;
        return [Math.max(...tokens.map((token) => token.getClientRects().length)),
            tokens.filter((token, i) => i && top(token) > top(tokens[i - 1]) + 5).map((token) => token.textContent)];"""
    for width in range(300, 420, 17):
        boxes, first_of_lines = browser.execute_script(script, width)
        assert boxes == 1, "no part of a token, such as its space alone, is in another line"
        assert first_of_lines and set(first_of_lines) <= {" wait", " for", " the"}, "lines break between words"


def test_a_character_of_several_tokens_is_shown_with_their_bytes(browser: webdriver.Chrome, tmp_path: Path) -> None:
    tokens = ["so", " <0xE6><0x95>", "<0xB0>", "<0xE6>"]
    one = ShownResponse("r", tokens, [[1.0] * 4], [-0.1] * 4, alternatives=[[("<0xE6><0x95>", 0.5)]] * 4)
    forks = ForkView([View("V", "", [Frame("", [ShownPrompt("p", "", [one])])])], "", 0.5)
    open_page(browser, made_page(tmp_path / "page.html", forks))
    shown = browser.execute_script("return [...document.querySelectorAll('.t')].map((t) => t.textContent)")
    assert shown == ["so", " 数⟨E6 95⟩", "⟨B0⟩", "⟨E6⟩"]
    look_for(browser, "数")
    until(browser, lambda: matches(browser) == "1")
    assert "bytes of a character that several tokens make up" in browser.find_element(By.ID, "forks").text
