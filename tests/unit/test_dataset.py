"""Prompts from files: what is read, what is kept aside, and one clear line for every fault."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jinja2 import TemplateError

from forkrl.config import TaskConfig
from forkrl.errors import UserError
from forkrl.tasks.dataset import load_dataset_task, load_evaluation_task
from forkrl.types import Prompt, Task, VerifierSpec

Rows = list[dict[str, Any]]


def rows(count: int) -> Rows:
    return [{"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(count)]


def write(path: Path, data: Rows) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(data), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return path


def load(path: Path | str, *, chat: Callable[[list[dict[str, str]]], str] | None = None, **settings: Any) -> Task:
    config = TaskConfig(name="dataset", data=str(path), **({"held_out_rows": 1} | settings))
    return load_dataset_task(config, apply_chat_template=chat)


def all_prompts(task: Task) -> list[Prompt]:
    return [*task.train, *task.held_out]


def chat_template(messages: list[dict[str, str]]) -> str:
    return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_become_prompts_in_file_order(tmp_path: Path, suffix: str) -> None:
    task = load(write(tmp_path / f"data{suffix}", rows(3000)), held_out_rows=10)
    assert (len(task.train), len(task.held_out)) == (2990, 10)
    numbers = [int(prompt.answer) for prompt in task.train]
    assert numbers == sorted(numbers)
    assert {(p.text, p.answer) for p in all_prompts(task)} == {(row["prompt"], row["answer"]) for row in rows(3000)}
    assert len({prompt.id for prompt in all_prompts(task)}) == 3000
    assert task.verifiers == {"": VerifierSpec("forkrl.rewards.math:verify_math")}


def test_jsonl_and_parquet_and_a_folder_of_both_agree(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "a.jsonl", rows(20)[:12])
    write(folder / "b.parquet", rows(20)[12:])
    (folder / "README.md").write_text("not data")
    tasks = [load(folder), *(load(write(tmp_path / name, rows(20))) for name in ("c.jsonl", "c.parquet"))]
    assert len({task.fingerprint for task in tasks}) == 1


def test_held_out_prompts_depend_on_no_order(tmp_path: Path) -> None:
    data = rows(50)
    first = load(write(tmp_path / "a.jsonl", data), held_out_rows=7)
    random.Random(0).shuffle(data)
    second = load(write(tmp_path / "b.jsonl", data), held_out_rows=7)
    assert first.held_out == second.held_out
    assert set(first.train) == set(second.train)
    assert first.fingerprint != second.fingerprint  # the order of training is part of the data
    more = load(write(tmp_path / "c.jsonl", rows(51)), held_out_rows=7)
    assert len(set(more.held_out) - set(first.held_out)) <= 1


def test_repeated_rows_are_dropped_and_never_straddle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    once = load(write(tmp_path / "once.jsonl", rows(20)), held_out_rows=5)
    many = load(write(tmp_path / "many.jsonl", rows(20) * 100), held_out_rows=5)
    assert many.fingerprint == once.fingerprint
    assert not {p.text for p in many.train} & {p.text for p in many.held_out}
    assert "many.jsonl: dropped 1,980 of 2,000 rows as duplicates" in capsys.readouterr().err


def test_questions_that_differ_only_in_whitespace_are_duplicates_if_their_answers_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [{"prompt": text, "answer": "3"} for text in ("1 + 2?", " 1 +  2?\n", "1\t+ 2?", "1+2?")]
    grids = [{"prompt": "1 2\n3 4", "answer": "a"}, {"prompt": "1 2 3 4", "answer": "b"}]
    task = load(write(tmp_path / "a.jsonl", same + grids))
    assert {prompt.text for prompt in all_prompts(task)} == {"1 + 2?", "1+2?", "1 2\n3 4", "1 2 3 4"}
    assert "a.jsonl: dropped 2 of 6 rows as duplicates" in capsys.readouterr().err


def test_a_held_out_question_is_not_trained_on_with_other_whitespace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aside = write(tmp_path / "aside.jsonl", [{"prompt": "What  is\n1 + 1?", "answer": "2"}])
    task = load(write(tmp_path / "a.jsonl", rows(3)), held_out_data=str(aside))
    assert [prompt.answer for prompt in task.train] == ["1", "3"]
    assert "1 questions of " in capsys.readouterr().err


BAD = [b'{"prompt": "", "answer": "1"}', b"{oops", b'{"prompt": "0?", "answer": "7"}', *[b'{"prompt": "3?"}'] * 9]


def file_with_bad_rows(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    good = [b'{"prompt": "%d?", "answer": "%d"}' % (n, n) for n in range(8)]
    path.write_bytes(b"\n".join([*good, *BAD]))
    return path


def test_of_several_bad_rows_the_first_ten_are_reported_and_all_counted(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(file_with_bad_rows(tmp_path))
    first, *listed, last = str(caught.value).splitlines()
    assert "a.jsonl: 12 of 20 rows cannot be used" in first and "task.skip_bad_rows = true" in first
    assert len(listed) == 10 and last == "  and 2 more"
    assert listed[0] == "  a.jsonl line 9: prompt is empty; remove the row or fill it in"
    assert "line 10 is not JSON" in listed[1]
    assert "line 11 asks what a.jsonl line 1 asks" in listed[2]
    assert "line 18 has no column 'answer'" in listed[9]


def test_bad_rows_are_left_out_on_request_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = file_with_bad_rows(tmp_path)
    task = load(path, skip_bad_rows=True)
    assert {prompt.answer for prompt in all_prompts(task)} == {str(n) for n in range(8)}
    said = capsys.readouterr().err
    assert "a.jsonl: left out 12 of 20 rows (task.skip_bad_rows)" in said
    assert "  a.jsonl line 9: prompt is empty" in said and "  and 2 more" in said
    path.write_bytes(b"\n".join(BAD[:2]))
    with pytest.raises(UserError, match=r"a.jsonl' holds no rows that can be used"):
        load(path, skip_bad_rows=True)


def test_messages_that_the_chat_template_rejects_are_a_bad_row(tmp_path: Path) -> None:
    def reject(messages: list[dict[str, str]]) -> str:
        raise TemplateError("roles must alternate")

    path = write(tmp_path / "a.jsonl", rows(1))
    with pytest.raises(UserError, match="line 1: the tokenizer's chat template rejects the messages .roles must"):
        load(path, chat=reject, chat_template=True)


def test_held_out_data_of_its_own(tmp_path: Path) -> None:
    train, aside = write(tmp_path / "train.jsonl", rows(10)), write(tmp_path / "aside.jsonl", rows(13)[8:])
    task = load(train, held_out_data=str(aside))
    assert [p.answer for p in task.held_out] == ["9", "10", "11", "12", "13"]
    assert [p.answer for p in task.train] == [str(n) for n in range(1, 9)]
    with pytest.raises(UserError, match="nothing is left"):
        load(train, held_out_data=str(train))


def test_an_evaluation_takes_all_of_a_file(tmp_path: Path) -> None:
    path, aside = write(tmp_path / "a.jsonl", rows(30) * 2), write(tmp_path / "b.jsonl", rows(35)[25:])
    config = TaskConfig(name="dataset", data=str(path))
    task = load_evaluation_task(config, apply_chat_template=None)
    assert [prompt.answer for prompt in task.held_out] == [str(n + 1) for n in range(30)]
    assert (task.name, list(task.train)) == (str(path), [])
    config = TaskConfig(name="dataset", data="never read", held_out_data=str(aside), template="Q {prompt}")
    task = load_evaluation_task(config, apply_chat_template=None)
    assert [prompt.text for prompt in task.held_out] == ["Q " + row["prompt"] for row in rows(35)[25:]]
    assert (
        task.fingerprint
        != load_evaluation_task(
            config.model_copy(update={"template": "{prompt}"}), apply_chat_template=None
        ).fingerprint
    )


def test_an_empty_subset_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(9))
    assert load(path, subset="").fingerprint == load(path).fingerprint
    with pytest.raises(UserError, match="task.subset = 'main' is for hub data sets"):
        load(path, subset="main")


def test_the_fingerprint_sees_every_change(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(9))
    changed = rows(9)
    changed[4]["answer"] = "nine"
    prints = [
        load(path).fingerprint,
        load(path, template="Q: {prompt}").fingerprint,
        load(path, held_out_rows=2).fingerprint,
        load(write(tmp_path / "b.jsonl", changed)).fingerprint,
        load(write(tmp_path / "c.jsonl", rows(8))).fingerprint,
    ]
    for cut in (3, 4):  # the same prompts in the same order, one of them on the other side
        train, aside = (
            write(tmp_path / f"t{cut}.jsonl", rows(9)[:cut]),
            write(tmp_path / f"h{cut}.jsonl", rows(9)[cut:]),
        )
        prints.append(load(train, held_out_data=str(aside)).fingerprint)
    assert len(set(prints)) == len(prints)
    assert load(path).fingerprint == prints[0]


def test_the_template_is_substituted_and_not_formatted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": r"Is {x} {0} \frac{1}{2} %s?", "answer": 1}, *rows(1)])
    plain = load(path)
    task = load(path, template="User: {prompt}\n{prompt} {other}")
    texts = {p.id: p.text for p in all_prompts(plain)}
    assert {p.id: p.text for p in all_prompts(task)} == {
        id: f"User: {text}\n{text} {{other}}" for id, text in texts.items()
    }


def test_chat_templates_take_text_and_messages(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    path = write(tmp_path / "a.jsonl", [{"prompt": messages, "answer": 2}, {"prompt": "2 + 2?", "answer": 4}])
    task = load(path, chat=chat_template, chat_template=True, template="Q {prompt}")
    assert {p.text for p in all_prompts(task)} == {
        "<system>Be brief.<user>Q 1 + 1?<assistant>",
        "<user>Q 2 + 2?<assistant>",
    }
    with pytest.raises(UserError, match="the model's tokenizer has no chat template"):
        load(path, chat_template=True)
    with pytest.raises(UserError, match=r'line 1: .*task\.prompt_column = "prompt\.0\.content"'):
        load(path, chat=chat_template)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_dots_reach_inside(tmp_path: Path, suffix: str) -> None:
    data: Rows = [
        {"prompt": [{"role": "user", "content": f"{n}?"}], "reward_model": {"ground_truth": n, "style": "rule"}, "x": 1}
        for n in range(3)
    ]
    task = load(
        write(tmp_path / f"a{suffix}", data),
        prompt_column="prompt.0.content",
        answer_column="reward_model.ground_truth",
    )
    assert {(p.text, p.answer) for p in all_prompts(task)} == {("0?", "0"), ("1?", "1"), ("2?", "2")}
    dotted = write(tmp_path / f"b{suffix}", [{"q.text": f"{n}?", "a": 0.5} for n in range(2)])
    assert {p.answer for p in all_prompts(load(dotted, prompt_column="q.text", answer_column="a"))} == {"0.5"}


def test_windows_files_are_text_too(tmp_path: Path) -> None:
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in [*rows(3), {"prompt": "π?\u2028", "answer": "é"}])
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n")
    assert {p.answer for p in all_prompts(load(path))} == {"1", "2", "3", "é"}


ONE = b'{"prompt": "1?", "answer": "1"}\n'
GOOD = ONE + b'{"prompt": "2?", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (b"", {}, "holds no rows"),
        (b"\n\n", {}, "holds no rows"),
        (GOOD + b"{oops\n", {}, "a.jsonl line 3 is not JSON"),
        (GOOD + b"\n[1]\n", {}, "a.jsonl line 4 is a list, not a JSON object"),
        (GOOD + b"[" * 100_000 + b"\n", {}, "line 3 is not JSON"),
        (GOOD + b'{"prompt": "\xff"}\n', {}, "line 3 is not UTF-8"),
        (GOOD + b'{"prompt": "", "answer": "1"}\n', {}, "line 3: prompt is empty"),
        (GOOD + b'{"prompt": " \\n", "answer": "1"}\n', {}, "line 3: prompt is empty"),
        (GOOD + b'{"prompt": null, "answer": "1"}\n', {}, "line 3: prompt is missing"),
        (GOOD + b'{"prompt": 5, "answer": "1"}\n', {}, "line 3: prompt is 5 (int), not text"),
        (GOOD + b'{"prompt": "\\ud800", "answer": "1"}\n', {}, "line 3: prompt holds half a surrogate"),
        (GOOD + b'{"prompt": "3?", "answer": ""}\n', {}, "line 3: answer is empty"),
        (GOOD + b'{"prompt": "3?", "answer": null}\n', {}, "line 3: answer is missing"),
        (GOOD + b'{"prompt": "3?", "answer": true}\n', {}, "line 3: answer is true or false"),
        (GOOD + b'{"prompt": "3?", "answer": NaN}\n', {}, "line 3: answer is nan"),
        (GOOD + b'{"prompt": "3?", "answer": {"a": 1}}\n', {}, "line 3: answer is an object"),
        (GOOD + b'{"prompt": "3?", "answer": ["3"]}\n', {}, 'task.answer_column = "answer.0"'),
        (GOOD + b'{"prompt": "3?", "anwser": "1"}\n', {}, "line 3 has no column 'answer' (task.answer_column); it has"),
        (GOOD + b'{"prompt": "3?", "anwser": "1"}\n', {}, "did you mean 'anwser'?"),
        (ONE, {"prompt_column": "question"}, "line 1 has no column 'question' (task.prompt_column); it has: prompt, "),
        (ONE, {"answer_column": "answer.text"}, "no column 'answer.text'"),
        (
            GOOD + b'{"prompt": "1?", "answer": "5"}\n',
            {},
            "line 3 asks what a.jsonl line 1 asks, but its answer",
        ),
        (GOOD, {"held_out_rows": 2}, "task.held_out_rows = 2 leaves nothing to train on: "),
        (GOOD * 9, {"held_out_rows": 9}, "has 2 distinct questions"),
        (GOOD, {"subset": "main"}, "task.subset = 'main' is for hub data sets"),
        (GOOD, {"split": "test"}, "task.split = 'test' is for hub data sets"),
        (GOOD, {"held_out_data": "missing.jsonl"}, "task.held_out_data = 'missing.jsonl': no such file"),
    ],
)
def test_faults_of_a_file_are_one_line(tmp_path: Path, content: bytes, settings: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(path, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "is not the user's"),
        ([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], "is not the user's"),
        (["hello"], "no role and content"),
        ([{"role": "user"}], "no role and content"),
        ([{"role": "user", "content": ["parts"]}], "a chat message is a list, not text"),
        ([{"role": "user", "content": ""}], "prompt is empty"),
    ],
)
def test_faults_of_chat_messages_name_the_row(tmp_path: Path, messages: list[Any], message: str) -> None:
    path = write(tmp_path / "a.jsonl", [*rows(3), {"prompt": messages, "answer": 1}])
    with pytest.raises(UserError) as caught:
        load(path, chat=chat_template, chat_template=True)
    assert message in str(caught.value)
    assert "a.jsonl line 4" in str(caught.value)


def test_faults_of_a_path(tmp_path: Path) -> None:
    for path, message in [
        (tmp_path / "none.jsonl", "no such file or folder"),
        (tmp_path / "none", "no such file or folder"),
        (tmp_path, "holds no .jsonl or .parquet file"),
    ]:
        with pytest.raises(UserError, match=message):
            load(path)
    (tmp_path / "a.csv").write_text("prompt,answer\n")
    with pytest.raises(UserError, match="convert it"):
        load(tmp_path / "a.csv")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match=r"torn\.parquet: cannot be read as Parquet"):
        load(tmp_path / "torn.parquet")
    data = [*rows(2000), {"prompt": "", "answer": "1"}]
    with pytest.raises(UserError, match=r"b\.parquet row 2001: prompt is empty"):
        load(write(tmp_path / "b.parquet", data))
    with pytest.raises(UserError, match=r"b\.parquet has no column 'promt' .*did you mean 'prompt'\?"):
        load(tmp_path / "b.parquet", prompt_column="promt")


class TestHub:
    def test_a_data_set_of_the_hub_is_read_like_a_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        asked: list[tuple[str, str | None, str]] = []

        def load_dataset(name: str, subset: str | None, *, split: str) -> Any:
            asked.append((name, subset, split))
            return datasets.Dataset.from_list(rows(2000) if split == "train" else rows(2005)[2000:])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        task = load("owner/name", subset="main", held_out_data="owner/name:test")
        assert asked == [("owner/name", "main", "train"), ("owner/name", "main", "test")]
        assert (len(task.train), len(task.held_out)) == (2000, 5)
        load("owner/name", subset="")
        assert asked[-1] == ("owner/name", None, "train")
        file = load(write(tmp_path / "a.jsonl", rows(2000)))
        assert load("owner/name").fingerprint == file.fingerprint
        with pytest.raises(UserError, match=r"owner/name has no column 'q' .*it has: prompt, answer"):
            load("owner/name", prompt_column="q")

    def test_an_unreachable_hub_names_the_way_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        def load_dataset(*_: object, **__: object) -> Any:
            raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nand more")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(UserError) as caught:
            load("owner/name")
        assert "Couldn't reach" in str(caught.value)
        assert "give the path of a .jsonl or .parquet file" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_prompts_without_answers_can_be_looked_at_and_not_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", [{"prompt": f"Say {n}."} for n in range(3)])
    config = TaskConfig(name="dataset", data=str(path), verifier="none")
    task = load_evaluation_task(config, apply_chat_template=None)
    assert [prompt.answer for prompt in task.held_out] == ["", "", ""]
    assert task.verifiers == {}
    with pytest.raises(UserError, match="training needs something to judge"):
        load_dataset_task(config, apply_chat_template=None)
    with pytest.raises(UserError, match=r"set task.answer_column \(or task.verifier=none"):
        load_evaluation_task(TaskConfig(name="dataset", data=str(path)), apply_chat_template=None)
    parquet = write(tmp_path / "prompts.parquet", [{"prompt": "Say 1."}])
    config = TaskConfig(name="dataset", data=str(parquet), verifier="none")
    assert len(load_evaluation_task(config, apply_chat_template=None).held_out) == 1
