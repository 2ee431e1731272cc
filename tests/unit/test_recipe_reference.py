"""docs/recipes.md is the schema, and the schema explains itself."""

from __future__ import annotations

from pathlib import Path

from forkrl.config import Section, TrainConfig
from forkrl.recipe_reference import recipe_reference


def test_the_page_is_what_the_program_prints() -> None:
    page = Path(__file__).parents[2] / "docs" / "recipes.md"
    assert page.read_text() == recipe_reference(), "run: forkrl train --settings > docs/recipes.md"


def test_every_setting_says_what_it_does() -> None:
    for name, field in TrainConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            silent = [key for key, setting in section.model_fields.items() if not setting.description]
            assert not silent, f"[{name}] {silent}"
        else:
            assert field.description, name
