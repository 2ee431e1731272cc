"""docs/recipes.md is the schema, and the schema explains itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from forkrl.cli import main
from forkrl.config import SftConfig, TrainConfig
from forkrl.config.reference import recipe_reference
from forkrl.config.sections import Section


def test_the_page_is_what_the_program_prints() -> None:
    page = Path(__file__).parents[2] / "docs" / "recipes.md"
    assert page.read_text() == recipe_reference(), "run: forkrl train --settings > docs/recipes.md"


@pytest.mark.parametrize("recipe", [TrainConfig, SftConfig])
def test_every_setting_says_what_it_does_and_is_on_the_page(recipe: type[Section]) -> None:
    own_part = recipe_reference().split("## Recipes of forkrl ")[1 if recipe is TrainConfig else 2]
    left: list[tuple[str, type[Section]]] = [("", recipe)]
    while left:
        place, schema = left.pop()
        _, found, text = own_part.partition(f"### [{place}]\n" if place else "\n")
        assert found, place
        table = text.partition("\n#")[0]
        for name, field in schema.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                left.append((f"{place}.{name}".lstrip("."), field.annotation))
            else:
                assert field.description, f"[{place}] {name}"
                assert f"| `{name}` |" in table, f"[{place}] {name}"


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["train", "--settings", *words]) == 0
    return capsys.readouterr().out


def test_settings_are_filtered_by_name_and_reason(capsys: pytest.CaptureFixture[str]) -> None:
    text = listed(capsys, "CLIP")
    keys = [line.split(" = ")[0].strip() for line in text.splitlines() if " = " in line]
    assert keys == ["loss.objective", "loss.clip_low", "loss.clip_high", "loss.dual_clip"], "the first by its reason"
    assert "loss.clip_high = 0.28" in text and "epsilon_high (clip-higher)" in text and "\x1b" not in text
    assert "loss.clip_low" in listed(capsys, "clip", "low") and "dual_clip" not in listed(capsys, "clip", "low")
    assert "forkrl sft\n  data.habits.give_up = 0.3" in listed(capsys, "give_up")
    assert "task.parts.weight = 1.0" in listed(capsys, "weights")


def test_settings_are_coloured_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    assert "\x1b[36mloss.clip_high\x1b[0m = \x1b[32m0.28" in listed(capsys, "clip")
    assert "\x1b[1mforkrl sft" in listed(capsys), "without a word all of them, as a list"
