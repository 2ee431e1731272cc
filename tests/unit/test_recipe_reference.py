"""docs/recipes.md is the schema, and the schema explains itself."""

from __future__ import annotations

from pathlib import Path

import pytest

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
