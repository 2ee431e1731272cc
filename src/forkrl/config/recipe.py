"""Reading a recipe: a TOML file, and ``section.key=value`` on the command line over it. Imports no torch.

Unknown keys are errors that name the nearest real one.
"""

from __future__ import annotations

import copy
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import ValidationError

from forkrl.config import SftConfig, TrainConfig
from forkrl.config.sections import Section
from forkrl.errors import UserError

Recipe = TypeVar("Recipe", bound=Section)


def load_recipe(
    schema: type[Recipe], path: str | Path | None, overrides: Sequence[str] = (), *, base: Recipe | None = None
) -> Recipe:
    """Read a recipe and apply ``section.key=value`` overrides.

    Args:
        schema: what kind of recipe.
        path: a TOML file, or None for ``base``, or for the defaults where there is none.
        overrides: each ``section.key=value``; the value is TOML, a bare word is a string, and an empty one restores
            the default.
        base: the recipe to override when there is no file.
    """
    values = _read_toml(Path(path)) if path is not None else recipe_toml(base) if base is not None else {}
    values.pop("provenance", None)  # the config.toml of a run is a recipe too
    overridden = copy.deepcopy(values)
    for override in overrides:
        _apply_override(overridden, override)
    _accept_shorthand(schema, values)
    _accept_shorthand(schema, overridden)
    faults = _faults(schema, overridden)
    if path is not None and faults:
        _require_recipe_of(schema, values, path)
        without_overrides = _faults(schema, values)
        places: dict[str, list[str]] = {}
        for fault in faults:
            places.setdefault(str(path) if fault in without_overrides else "command line", []).append(fault)
        raise UserError("; ".join(f"{place}: {'; '.join(there)}" for place, there in places.items()))
    return parse_recipe(schema, overridden, "command line")


def parse_recipe(schema: type[Recipe], values: dict[str, Any], source: str) -> Recipe:
    """Validate a table of values; errors name ``source`` and the key."""
    if faults := _faults(schema, values):
        raise UserError(f"{source}: " + "; ".join(faults))
    return schema.model_validate(values)


def change_recipe(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values, by key (``{"training.steps": 60}``)."""
    values = recipe_toml(recipe)
    for key, value in changes.items():
        _set(values, key, value)
    return parse_recipe(type(recipe), values, "changes")


def recipe_differences(old: Section, new: Section) -> list[str]:
    """``key: old -> new`` for every setting that differs, in recipe order."""
    before, after = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    changed = [key for key in {**after, **before} if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in changed]


def recipe_toml(recipe: Section) -> dict[str, Any]:
    """The recipe as plain values that TOML can hold: unset options are left out."""
    return recipe.model_dump(mode="json", exclude_none=True)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"), parse_float=_parse_float)
    except FileNotFoundError:
        hint = "shipped ones are in recipes/"
        if path.suffix != ".toml":
            hint = "a setting is written section.key=value, without spaces around ="
        raise UserError(f"{path}: no such recipe; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a recipe ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


class _Power(float):
    """A number written as ``1e3``, which an integer setting takes as 1000."""


def _parse_float(text: str) -> float:
    return float(text) if "." in text or not float(text).is_integer() else _Power(text)


def _accept_shorthand(schema: type[Section], values: dict[str, Any]) -> None:
    """Replace ``1e3`` by 1000 in integer settings, and a bare word by a list of one where a list of words belongs."""
    for name, value in values.items():
        kind = schema.model_fields[name].annotation if name in schema.model_fields else None
        kinds = [getattr(each, "__origin__", each) for each in (kind, *get_args(kind))]
        if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, Section):
            _accept_shorthand(kind, value)
        elif isinstance(value, list) and (listed := item_section(kind)) is not None:
            for item in value:
                if isinstance(item, dict):
                    _accept_shorthand(listed, item)
        elif isinstance(value, _Power) and int in kinds:
            values[name] = int(value)
        elif isinstance(value, str) and not value.startswith("[") and tuple in kinds and kinds[1] in (str, Literal):
            values[name] = [value]


def _require_recipe_of(schema: type[Section], values: dict[str, Any], path: str | Path) -> None:
    """Say it in one sentence if a file is a recipe for the other command."""
    command, other, there = ("train", "sft", SftConfig) if schema is TrainConfig else ("sft", "train", TrainConfig)
    if not values.keys() <= schema.model_fields.keys() and values.keys() <= there.model_fields.keys():
        raise UserError(f"{path}: this is a recipe for `forkrl {other}`, not for `forkrl {command}`")


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` in nested ``values``. The value is TOML; a bare word is a string."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{override!r} is not an override; write section.key=value, as in optimizer.lr=1e-5")
    try:
        value = tomllib.loads(f"value = {text}", parse_float=_parse_float)["value"]
    except tomllib.TOMLDecodeError:
        value = text
    _set(values, key.strip(), value if text.strip() else None)


def _set(table: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b`` in nested tables; None restores the default."""
    *sections, name = key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise UserError(f"{key}: {section} is a value, not a section")
    if value is None:
        table.pop(name, None)
    else:
        table[name] = value


def _faults(schema: type[Section], values: dict[str, Any]) -> list[str]:
    """Everything that is wrong with a table of values, a phrase each."""
    try:
        schema.model_validate(values)
    except ValidationError as error:
        return [_explain(schema, item) for item in error.errors()]
    return []


def _explain(schema: type[Section], item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        nearest = _nearest_key(key, _known_keys(schema))
        return f"{key} is not a setting" + (f"; did you mean {nearest}?" if nearest else "")
    message = str(item["msg"]).removeprefix("Value error, ").replace("valid tuple", "list")
    if not key or (item["type"] == "value_error" and "." in message.split(" ")[0]):
        return f"{key}: {message}" if key[-1:].isdigit() else message  # of a list of tables, say which
    return f"{key} = {item['input']!r}: {message[0].lower() + message[1:]}"


def _nearest_key(key: str, known: list[str]) -> str | None:
    """The setting most likely meant: the same name in another section, else the closest spelling."""
    name = key.rpartition(".")[2]
    moved = [candidate for candidate in known if candidate.rpartition(".")[2] == name]
    return next(iter(moved or difflib.get_close_matches(key, known, n=1)), None)


def item_section(annotation: Any) -> type[Section] | None:
    """The kind of table that a setting lists, as ``task.parts`` does; None for other settings."""
    kind = next(iter(get_args(annotation)), None)
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _known_keys(schema: type[Section], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in schema.model_fields.items():
        inner = field.annotation
        if (listed := item_section(inner)) is not None:
            inner = None if listed is schema else listed
        if isinstance(inner, type) and issubclass(inner, Section):
            keys += [prefix + name, *_known_keys(inner, f"{prefix}{name}.")]
        else:
            keys.append(prefix + name)
    return keys
