"""Answers found in responses by ``task.answer_format``, in workers that survive what a model writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from forkrl.config import RewardConfig, TaskConfig
from forkrl.config.task import ANSWER_FORMATS
from forkrl.rewards import VerifierPool, open_verifier
from forkrl.rewards.answer_format import answer_extractor
from forkrl.rewards.batch import Source
from forkrl.tasks.gym import gym_task
from forkrl.types import Prompt, VerifierResult, VerifierSpec

MATH = "forkrl.rewards.math:verify_math"

NUMBERS = [
    ("3 + 4 = 42.", "42"),
    ("It costs $1,234.50", "1234.50"),
    ("Between 3, 4 and 5,000,000.", "5000000"),
    (r"1{,}234 \$", "1234"),
    ("3,14", "14"),
    ("-5", "-5"),
    ("= \u22127", "-7"),
    ("\u20137 degrees", "-7"),
    ("(-7)", "-7"),
    ("**-7**", "-7"),
    ("-$5", "-5"),
    (r"\u2212\$3,000".replace(r"\u2212", "\u2212"), "-3000"),
    ("$-5", "-5"),
    ("€-5.5", "-5.5"),
    ("10-5", "5"),
    ("x-5", "5"),
    ("(2)-5", "5"),
    ("10 - 5", "5"),
    ("yes--5", "5"),
    ("+5", "5"),
    (".5", "0.5"),
    ("so ...5", "5"),
    ("-0.25%", "-0.25"),
    (r"50\%", "50"),
    ("42km", "42"),
    ("3/4", "3/4"),
    ("\u22123 / 4.", "-3/4"),
    (r"-\frac{ 3 }{4}", "-3/4"),
    (r"\dfrac{1}{2}$", "1/2"),
    ("6.02e23", "6.02e23"),
    ("1E-5", "1e-5"),
    ("2.5e+3", "2.5e3"),
    (r"2 \times 10^{-5} m", "2e-5"),
    ("2 × 10^\u22125", "2e-5"),
    ("3 * 10^2 = 300", "300"),
    ("10^5", "10"),
    ("2^{10}", "2"),
    (r"x \times 10^{5}", "10"),
    (r"y = x^{5}", None),
    ("10^-5, 2 ^ 10", "2"),
    (r"x_{2}", None),
    (r"3 e^{-\frac{1}{2}}", "3"),
    (r"\frac{3.5}{2}", "3.5/2"),
    (r"\frac{-3}{4}", "-3/4"),
    ("-\\frac{3}{\u22124}", "3/4"),
    (r"\frac{1,000}{.5}", "1000/0.5"),
    (r"x\frac{1}{2}", "1/2"),
    (r"2\frac{1}{2}", "5/2"),
    (r"-2 \dfrac{1}{2}", "-5/2"),
    (r"2\frac{3}{2}", "3/2"),
    ("1 1/2", "3/2"),
    ("-1 1/2.", "-3/2"),
    ("2 3/2", "3/2"),
    ("on 5 1/2/2020", "2020"),
    ("1" * 5000 + " 1/2", "1/2"),
    ("1 000", "1000"),
    ("2 500 000.5", "2500000.5"),
    ("1 000/3", "1000/3"),
    ("1 234", "234"),
    (r"1\,234, or 1,\!235", "1235"),
    ("1\u202f234 m", "1234"),
    ("x2 is 8, as y_1", "8"),
    ("GPT4", None),
    ("version 1.2.3", "1.2"),
    ("COVID-19", "19"),
    ("<think>5</think>7", "7"),
    ("<think>5", None),
    ("7<|im_end|>", "7"),
    ("none", None),
    ("", None),
]


@pytest.mark.parametrize(("response", "answer"), NUMBERS)
def test_the_last_number_is_found_and_written_plainly(response: str, answer: str | None) -> None:
    assert answer_extractor("last_number")(response) == answer


OTHERS = [
    ("boxed", r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    ("boxed", r"\boxed{1} no: \boxed{2}", "2"),
    ("boxed", r"\boxed{1} and \boxed{2}", r"1 \text{ and } 2"),
    ("boxed", r"\boxed{ \boxed{7} }", "7"),
    ("boxed", r"\boxed{7", None),
    ("boxed", r"\boxed{}", None),
    ("boxed", "7", None),
    ("answer_tag", "<answer>\n7 8 </answer> done", "7 8"),
    ("answer_tag", "<answer>1 <answer>2</answer>", "2"),
    ("answer_tag", "<answer><answer>2</answer></answer>", "2"),
    ("answer_tag", "<answer>2</answer> or 3</answer>", "2"),
    ("answer_tag", "<answer>2</answer></answer>", "2"),
    ("answer_tag", "<answer> </answer>", None),
    ("answer_tag", "</answer>2<answer>", None),
    ("answer_tag", "<think><answer>1</answer></think><answer>2", None),
    (r"Answer: (\w+)", "Answer: a. Answer: b.", "b"),
    (r"Answer: (\w+)", "<think>Answer: a</think> none", None),
    (r"(?:Answer: (\w+)|nothing)", "Answer: a, nothing", "a"),
    (r"(?i)answer:(?P<a>.*)", "ANSWER: ", None),
    (r"^(.+)$", "one line", "one line"),
]


@pytest.mark.parametrize(("answer_format", "response", "answer"), OTHERS)
def test_the_last_answer_that_is_not_empty_counts(answer_format: str, response: str, answer: str | None) -> None:
    assert answer_extractor(answer_format)(response) == answer


LONG = ("111," * 100_000, "1 " * 200_000, "1" + " " * 400_000, "-$" * 200_000, r"\frac{" * 70_000, "<answer>" * 50_000,
        "<answer>" * 50_000 + "</answer>" * 50_000, "^{" * 100_000, "^{^{}" * 50_000, "111 " * 100_000,
        r"\boxed{" * 60_000, "1/" * 200_000)  # fmt: skip


def test_long_responses_take_no_failure() -> None:
    """A finder of quadratic time would be killed."""
    specs = {name: VerifierSpec(MATH, answer_format=name) for name in ANSWER_FORMATS}
    items = [(Prompt("p", "?", "3", source=name), response) for name in ANSWER_FORMATS for response in LONG]
    with VerifierPool(specs, workers=1, timeout_s=20) as pool:
        assert [result.failure for result in pool.verify(items)] == [""] * len(items)


def judged(spec: VerifierSpec, *cases: tuple[str, str], prompt: str = "?") -> list[VerifierResult]:
    """Results of (gold answer, response) pairs."""
    with VerifierPool({"": spec}, timeout_s=20) as pool:
        return pool.verify([(Prompt("p", prompt, gold), response) for gold, response in cases])


def test_mathematics_gets_the_answer_and_not_a_response() -> None:
    """In a response, 2 would be the last number of 1/2."""
    spec = VerifierSpec(MATH, answer_format=r"Answer: (.+)")
    cases = [("1/2", r"Answer: \frac{1}{2}"), ("3", "it is 3"), ("1/2", r"\boxed{0.5}"), ("3", "Answer: " + "3" * 2000)]
    results = judged(spec, *cases)
    assert [result.score for result in results] == [1, 0, 0, 0]
    assert [result.answer for result in results] == ["1/2", "", "", ""]
    assert not any(result.failure for result in results)


OWN = """
def equal(answer, response):
    return float(answer == response)


def named(answer, response):
    return float(answer == response), f"<{response}>"


def shown(answer, response):
    return 1.0, response
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "judges_of_answers.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "judges_of_answers"


def test_any_verifier_gets_the_answer_as_its_response(own: str) -> None:
    spec = VerifierSpec(f"{own}:equal", answer_format="last_number")
    assert judged(spec, ("42", "6 · 7 = 42."), ("42", "no idea")) == [
        VerifierResult(1.0, "", "42"), VerifierResult(0.0, "", ""),
    ]  # fmt: skip
    [named] = judged(VerifierSpec(f"{own}:named", answer_format="last_number"), ("42", "It is 42."))
    assert named == VerifierResult(1.0, "", "<42>")


def test_a_regex_bomb_is_killed_and_counted_and_others_are_judged(own: str) -> None:
    spec = VerifierSpec(f"{own}:equal", answer_format=r"((?:a+)+)!")
    items = [(Prompt(f"id-{n}", "?", "aa"), text) for n, text in enumerate(("aa!", "a" * 60, "so aa!", "b"))]
    with VerifierPool({"": spec}, timeout_s=1.0) as pool:
        results = pool.verify(items)
        assert pool.first_failures == {
            "timeout": "prompt id-1: gave no answer within 1 s (with task.answer_format = '((?:a+)+)!')"
        }
    assert [(result.score, result.failure) for result in results] == [(1, ""), (0, "timeout"), (1, ""), (0, "")]


def test_the_prefill_is_part_of_the_response(own: str) -> None:
    spec = VerifierSpec(f"{own}:shown", prefill="<answer>", answer_format="answer_tag")
    assert [result.answer for result in judged(spec, ("", "7</answer>"), ("", "7"), prompt="?<answer>")] == ["7", ""]
    spec = VerifierSpec(f"{own}:shown", prefill="Sure: ")
    assert [result.answer for result in judged(spec, ("", "7<|im_end|>"), prompt="?Sure: ")] == ["Sure: 7"]
    # The chat template opened the thinking, before the prefill.
    spec = VerifierSpec(f"{own}:shown", prefill="Well", answer_format="last_number")
    cases = ("", ", 7"), ("", ", 7</think>8")
    assert [result.answer for result in judged(spec, *cases, prompt="?<think>\nWell")] == ["", "8"]


def test_the_sums_of_a_small_model_are_judged_by_their_last_number() -> None:
    """reasoning-gym's chain_sum with two terms, without a format and with it."""
    recipe = {"min_terms": 2, "max_terms": 2}
    config = TaskConfig(name="reasoning-gym", generator="chain_sum", settings=recipe, held_out_rows=2, train_prompts=1)
    task = gym_task(config.model_copy(update={"answer_format": "last_number"}), apply_chat_template=None)
    prompt = task.held_out[0]
    left, sign, right = re.findall(r"\d+|[-+]", prompt.text)[:3]
    total = int(left) + (1 if sign == "+" else -1) * int(right)
    texts = [f"The sum of {left} and {right} is {total:,}.", f"{left} {sign} {right} = {total + 1}", "I do not know"]
    with open_verifier(task.verifiers, RewardConfig()) as pool:
        results = pool.verify([(prompt, text) for text in texts])
    assert [(result.score == 1, result.answer) for result in results] == [
        (True, str(total)), (False, str(total + 1)), (False, ""),
    ]  # fmt: skip
    assert prompt.text.endswith("as the last number.")
    plain = gym_task(config, apply_chat_template=None)
    assert plain.verifiers == {"": VerifierSpec("forkrl.rewards.gym:verify_gym")}
    with open_verifier(plain.verifiers, RewardConfig()) as pool:
        results = pool.verify([(prompt, text) for text in (texts[0], f"<answer>{total}</answer>")])
    assert [(result.score, result.answer) for result in results] == [(0, ""), (1, str(total))]


@pytest.mark.parametrize("answer_format", ["", "boxed"])
def test_a_format_that_matches_nothing_in_200_responses_is_announced_once(answer_format: str) -> None:
    said: list[str] = []
    specs = {name: VerifierSpec(MATH, answer_format=answer_format) for name in ("a", "b")}
    with VerifierPool(specs) as pool:
        pool.announce = said.append
        for count in (199, 1, 300):
            none = [(Prompt("p", "?", "3", source="a"), f"no\x1b[2J{'!' * n}") for n in range(count)]
            one = [(Prompt("p", "?", "3", source="b"), "3 \\boxed{3}" if n == 150 else "no") for n in range(count)]
            pool.verify(none + one)
            assert bool(said) == (count != 199)
    [message] = said
    finder = "task.answer_format = 'boxed'" if answer_format else f"the verifier {MATH}"
    assert message.startswith(
        f"a: {finder} found no answer in the first 200 responses; ask for that form in the prompt"
    )
    assert message.endswith(r"three of them end in 'no\x1b[2J', 'no\x1b[2J!', 'no\x1b[2J!!'") and "\n" not in message


FIXED = "the form is fixed"


@pytest.mark.parametrize(
    ("spec", "remedy", "said"),
    [
        (VerifierSpec(MATH), "", "or set task.answer_format to what the responses hold (docs/tasks.md)"),
        (VerifierSpec("forkrl.rewards.code:verify_code"), "", "ask in the prompt for the program in a block fenced as"),
        (VerifierSpec("forkrl.rewards.code:verify_code", answer_format="boxed"), "", "or set task.answer_format to"),
        (VerifierSpec(MATH), FIXED, f"responses; {FIXED}; three"),
        (VerifierSpec("forkrl.rewards.code:verify_code"), FIXED, f"responses; {FIXED}; three"),
    ],
)
def test_the_remedy_fits_the_verifier_and_the_command(spec: VerifierSpec, remedy: str, said: str) -> None:
    source = Source(spec, 1.0, remedy)
    [message] = [told for _ in range(300) if (told := source.count("", "no", ""))]
    assert said in message
    assert ("task.answer_format to" in message) == ("task.answer_format to" in said)


BAD = [
    ("boxd", r"""task.answer_format = 'boxd' is none of "boxed", "answer_tag", "last_number", and as a regular """
             "expression it has no group; did you mean 'boxed'?"),
    ("Answer: .+", "it has no group; put the answer in one group, as in 'Answer: (.+)', and write other brackets as"),
    ("(a)(b)", "it has 2 groups; put the answer in one group"),
    ("(a", "and not a regular expression (missing ), unterminated subpattern at position 0); correct it"),
    ("(a{1,4294967295})", "and not a regular expression (the repetition number is too large); correct it"),
    ("", "it has no group"),
]  # fmt: skip


@pytest.mark.parametrize(("answer_format", "message"), BAD)
def test_an_unusable_format_is_one_sentence(answer_format: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TaskConfig(name="dataset", data="x.jsonl", answer_format=answer_format)


def test_a_sandboxed_verifier_and_a_server_keep_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    from forkrl.config import SandboxConfig
    from forkrl.rewards import code, endpoint

    monkeypatch.setattr(code, "require_sandbox", lambda config: None)
    spec = VerifierSpec("code", answer_format="answer_tag", prefill="Ok")
    bound = code.with_sandbox({"": spec}, SandboxConfig())[""]
    assert (bound.path, bound.answer_format, bound.prefill) == ("forkrl.rewards.code:verify_code", "answer_tag", "Ok")
    monkeypatch.setattr("httpx.options", lambda *_, **__: None)
    spec = VerifierSpec("e", {"url": "http://h/"}, answer_format="boxed", prefill="Ok")
    bound = endpoint.prepare_endpoint(spec, 10.0)
    assert (bound.answer_format, bound.prefill) == ("boxed", "Ok")
