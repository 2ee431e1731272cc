"""The fork view's data: exact where it is exact, small, cut where it must be and saying so."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest

from forkrl.report import Branch, Card, ForkView, Frame, Page, ShownPrompt, ShownResponse, View, render_page
from forkrl.report.fork_data import LAYER_BYTES, MAX_BYTES, MIN_TOKENS_SHOWN, TOKEN_BYTES, fork_data, token_limit
from forkrl.report.formatting import evenly_spaced, script_json
from tests.report_page import decoded

PER_TOKEN = TOKEN_BYTES + LAYER_BYTES


def response(num_tokens: int, label: str = "Response 1", **more: Any) -> ShownResponse:
    return ShownResponse(label, ["x"] * num_tokens, [[0.5] * num_tokens], [-0.5] * num_tokens, **more)


def forks_of(*responses: ShownResponse, layers: tuple[str, ...] = ("",), **more: Any) -> ForkView:
    prompts = [ShownPrompt(f"prompt {i}", "", [each]) for i, each in enumerate(responses)]
    return ForkView([View("All", "Note.", [Frame("", prompts)], layers=layers)], "Lead.", more.get("mark"))


def first(forks: ForkView) -> dict[str, Any]:
    found: dict[str, Any] = decoded(fork_data(forks))[0]["frames"][0]["prompts"][0]["responses"][0]
    return found


def test_every_number_of_a_token_arrives() -> None:
    one = ShownResponse(
        label="Response 7",
        tokens=["so", " wait"],
        entropy=[[0.0001, 1.23456], [2.0, math.nan]],
        logprobs=[-0.00012, -math.inf],
        selected=[False, True],
        ranks=[1, 12],
        alternatives=[[("so", 0.9), (" a", 0.1)], [("b", 0.5)]],
        branches={1: [Branch("b", 0.5, 0.25, 0.1, 0.4, 20)]},
        score=0.5,
        finished=False,
    )
    data = fork_data(forks_of(one, layers=("base", "final"), mark=0.67254))
    shown = decoded(data)[0]["frames"][0]["prompts"][0]["responses"][0]
    assert (data["mark"], data["scale"]) == (6725, 2.0)
    assert (shown["label"], shown["t"], shown["f"], shown["r"]) == ("Response 7", ["so", " wait"], "01", [1, 12])
    assert shown["e"] == [[0.0001, 1.2346], [2.0, None]]
    assert shown["l"] == [-0.0001, None]
    assert (shown["w"], shown["a"]) == (2, [("so", 0.9), (" a", 0.1), ("b", 0.5)])
    place = data["texts"].index("b")
    assert shown["b"] == {"1": [[place, 0.5, 0.25, 0.1, 0.4, 20]]}
    assert (shown["score"], shown["reward"], shown["advantage"], shown["finished"]) == (0.5, None, None, False)
    assert (shown["length"], shown["selected"]) == (2, 1)


def test_each_text_is_kept_once_and_made_visible() -> None:
    alternatives = [[("\x1b", 0.5), ("x", 0.5)]] * 100
    data = fork_data(forks_of(response(100, alternatives=alternatives), response(100)))
    assert data["texts"] == ["x", "␛"]


def test_empty_lists_say_nothing() -> None:
    shown = first(forks_of(ShownResponse("r", ["a"], [[0.1]], [])))
    assert (shown["l"], shown["f"], shown["selected"]) == ([], "", None)
    assert not {"r", "a", "w", "b"} & set(shown)


def test_empty_response_and_empty_frame_make_a_page() -> None:
    forks = forks_of(ShownResponse("r", [], [[]], []))
    assert first(forks)["length"] == 0
    forks.views[0].frames = [Frame("", [])]
    assert decoded(fork_data(forks))[0]["frames"][0]["prompts"] == []


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (ShownResponse("Response 3", ["a"], [[0.1, 0.2]], []), "Response 3: needs 1 lists of 1 entropies"),
        (ShownResponse("Response 3", ["a"], [[0.1], [0.1]], []), "Response 3: needs 1 lists of 1 entropies"),
        (ShownResponse("Response 3", ["a"], [[0.1]], [], ranks=[1, 2]), "Response 3: each list must have a value"),
        (ShownResponse("Response 3", ["a"], [[0.1]], [-1.0, -1.0]), "Response 3: each list must have a value"),
    ],
)
def test_lists_of_unequal_length_are_refused(broken: ShownResponse, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fork_data(forks_of(broken))


def test_long_responses_are_cut_and_say_so() -> None:
    forks = forks_of(*(response(3000, selected=[True] * 3000) for _ in range(5)), response(10))
    view = decoded(fork_data(forks, max_bytes=PER_TOKEN * (2500 * 5 + 10)))[0]
    shown = [prompt["responses"][0] for prompt in view["frames"][0]["prompts"]]
    assert [len(each["t"]) for each in shown] == [2500] * 5 + [10]
    assert {len(values) for each in shown[:5] for values in (each["e"][0], each["l"], each["f"])} == {2500}
    assert (shown[0]["length"], shown[0]["selected"]) == (3000, 3000)
    assert view["note"] == "Note. 5 long responses are cut after 2,500 tokens."


def test_branches_beyond_the_cut_are_left_out() -> None:
    branch = [Branch("x", 0.5, 0.5, 0.4, 0.6, 8)]
    forks = forks_of(response(3000, branches={0: branch, 2999: branch}))
    assert list(
        decoded(fork_data(forks, max_bytes=PER_TOKEN * 2500))[0]["frames"][0]["prompts"][0]["responses"][0]["b"]
    ) == ["0"]


def test_prompts_go_before_responses_are_cut_to_pieces() -> None:
    forks = forks_of(*(response(100) for _ in range(1000)))
    view = decoded(fork_data(forks, max_bytes=PER_TOKEN * 100 * 300))[0]
    prompts = view["frames"][0]["prompts"]
    assert 250 <= len(prompts) <= 300
    assert {len(prompt["responses"][0]["t"]) for prompt in prompts} == {100}
    assert (prompts[0]["prompt"], prompts[-1]["prompt"]) == ("prompt 0", "prompt 999")
    assert view["note"] == f"Note. To keep this page small, {len(prompts)} of 1,000 prompts are shown, evenly spaced."


def test_every_frame_keeps_a_prompt() -> None:
    frames = [Frame(str(i), [ShownPrompt("p", "", [response(3 * MIN_TOKENS_SHOWN)])] * 3) for i in range(4)]
    forks = ForkView([View("V", "", frames)], "", None)
    view = decoded(fork_data(forks, max_bytes=PER_TOKEN * 4000))[0]
    assert [len(frame["prompts"]) for frame in view["frames"]] == [1] * 4
    assert {len(frame["prompts"][0]["responses"][0]["t"]) for frame in view["frames"]} == {1000}


@pytest.mark.parametrize(("layers", "alternatives"), [(1, 5), (20, 5), (1, 0), (8, 20)])
def test_budget_holds_whatever_a_token_carries(layers: int, alternatives: int) -> None:
    rng = random.Random(0)

    def word() -> str:
        return f" w{rng.randrange(150_000)}"

    def made(count: int) -> ShownResponse:
        tried = [[(word(), rng.random()) for _ in range(alternatives)] for _ in range(count)] if alternatives else []
        entropy = [[rng.random() * 3 for _ in range(count)] for _ in range(layers)]
        return ShownResponse("r", [word() for _ in range(count)], entropy, [-5 * rng.random()] * count, (), [], tried)

    forks = forks_of(*(made(200) for _ in range(100)), layers=("l",) * layers)
    budget = 300_000
    data = fork_data(forks, max_bytes=budget)
    data.pop("texts")  # grows with the vocabulary, not with the tokens
    assert len(script_json(data)) < budget
    assert "To keep this page small" in decoded(fork_data(forks, max_bytes=budget))[0]["note"]


def test_a_thousand_responses_fit_whole() -> None:
    alternatives = [[(f" w{i}", 0.2) for i in range(5)]] * 105
    forks = forks_of(*(response(105, alternatives=alternatives, ranks=[1] * 105) for _ in range(1000)))
    view = decoded(fork_data(forks, MAX_BYTES))[0]
    assert view["note"] == "Note."
    assert len(view["frames"][0]["prompts"]) == 1000


def test_page_without_a_fork_view_carries_none_of_it() -> None:
    page = render_page(Page("m", "analysis", "Headline.", []))
    assert "Where the model forks" not in page
    assert "fork-data" not in page
    assert "IntersectionObserver" not in page
    assert "<title>m · ForkRL analysis</title>" in page
    empty = render_page(Page("m", "analysis", "Headline.", [], forks=ForkView([], "No responses were kept.", None)))
    assert "No responses were kept." in empty
    assert "fork-data" not in empty


def test_hostile_text_is_visible_in_every_field() -> None:
    hostile = "</script><b>\u2028\u202e\x00\ud800"
    one = ShownResponse(
        hostile, [hostile], [[1.0]], [-1.0], alternatives=[[(hostile, 1.0)]],
        branches={0: [Branch(hostile, 1.0, 0.5, 0.4, 0.6, 8)]},
    )  # fmt: skip
    view = View(hostile, hostile, [Frame(hostile, [ShownPrompt(hostile, hostile, [one])])], (hostile,), hostile)
    text = script_json(fork_data(ForkView([view], hostile, None)))
    assert "<" not in text
    shown = json.dumps(json.loads(text), ensure_ascii=False)
    assert not set("\u2028\u202e\x00\ud800") & set(shown)
    assert shown.count("⟨U+2028⟩⟨U+202E⟩␀⟨U+D800⟩") == 9  # one for the three of tokens, alternatives and branches
    page = render_page(Page(hostile, hostile, hostile, [], forks=ForkView([view], hostile, None)))
    page.encode("utf-8")  # no lone surrogate
    assert page.count("</script>") == 2
    assert not set("\u2028\u202e\x00") & set(page)


def test_entropies_may_be_arrays() -> None:
    one = ShownResponse("r", ["a"] * 3, [np.array([0.1, 0.2, np.nan], dtype=np.float32)], np.zeros(3))  # type: ignore[list-item,arg-type]
    assert first(forks_of(one))["e"] == [[0.1, 0.2, None]]


@pytest.mark.parametrize(
    ("lengths", "budget", "limit"),
    [([3, 5], 8, 5), ([3, 5], 7, 4), ([1, 100, 100], 21, 10), ([9, 9], 1, 1), ([], 5, 1)],
)
def test_token_limit(lengths: list[int], budget: int, limit: int) -> None:
    assert token_limit(lengths, budget) == limit


@pytest.mark.parametrize(
    ("count", "limit", "chosen"),
    [(3, 5, [0, 1, 2]), (10, 4, [0, 3, 6, 9]), (0, 4, []), (100, 2, [0, 99]), (9, 1, [0]), (9, 0, [])],
)
def test_evenly_spaced(count: int, limit: int, chosen: list[int]) -> None:
    assert evenly_spaced(count, limit) == chosen


def test_a_fork_in_the_page_is_strictly_above_the_mark() -> None:
    rng = np.random.default_rng(4)
    for mark in (0.0, 1e-5, 0.67206, 0.67204, 1.0):
        near = mark + np.array([-1e-4, -4e-5, -1e-6, 0.0, 1e-6, 4e-5, 1e-4])
        entropy = np.concatenate([near.clip(0), rng.exponential(0.5, 50), [math.nan]]).tolist()
        one = ShownResponse("Response 1", ["x"] * 58, [entropy], [-0.5] * 58)
        shown = fork_data(forks_of(one, mark=mark))
        found = shown["views"][0]["frames"][0]["prompts"][0]["responses"][0]["e"][0]
        above = [value is not None and value > shown["mark"] for value in found]
        assert above == [value > mark for value in entropy]


def made(*tokens: str, prompt: str = "p") -> str:
    """A page whose fork view shows one response."""
    one = ShownResponse("r", tokens, [[0.5] * len(tokens)], [])
    view = View("V", "", [Frame("", [ShownPrompt(prompt, "", [one])])])
    return render_page(Page("p", "k", "v", [], forks=ForkView([view], "", None)))


@pytest.mark.parametrize(
    ("token", "explained"),
    [
        ("\n", "⏎ is a line break"),
        ("\t", "⇥ a tab"),
        ("", "⟨⟩ a token without text"),
        ("\u202e", "⟨U+…⟩ a character"),
        ("\x1b", "␛ and its like"),
        ("<0xE6>", "⟨E6 95⟩ bytes of a character"),
    ],
)
def test_marks_are_explained_where_they_are(token: str, explained: str) -> None:
    assert explained in made("a", token)
    assert explained not in made("a", "b")


def test_the_notation_of_countdown_is_explained_once() -> None:
    assert made("a", prompt="2 5 9:90?").count("A Countdown problem") == 1
    assert "A Countdown problem" not in made("a", prompt="What is 2:3?")


def test_settings_that_differ_are_explained_where_there_are_any() -> None:
    for differs in (True, False):
        page = render_page(Page("p", "k", "v", [], settings=[("s", [("key", "1", differs)])]))
        assert ("differs from ForkRL's default" in page) == differs


def test_a_number_that_prints_alike_before_and_after_is_unchanged() -> None:
    page = render_page(Page("p", "k", "v", [], cards=[Card("A", "10%", "10%"), Card("B", "11%", "10%")]))
    assert '<span class="before">unchanged at </span>10%' in page and '<span class="before">10% → </span>11%' in page


def test_tokens_of_an_environment_are_set_apart() -> None:
    one = ShownResponse(
        "a", ["3", "?", "5"], [[0.5, math.nan, 0.1]], [-0.5, math.nan, -1.0], others=[False, True, False]
    )
    shown = first(forks_of(one))
    assert (shown["o"], shown["others"], shown["length"]) == ("010", 1, 3)
    assert shown["e"] == [[0.5, None, 0.1]] and "o" not in first(forks_of(response(3)))
