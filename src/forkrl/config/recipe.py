"""Reads a recipe: a TOML file, and ``section.key=value`` overrides from the command line. Imports no torch."""

from __future__ import annotations

import copy
import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from forkrl.config import SftConfig, TrainConfig
from forkrl.config.secret_values import reject_written_secrets
from forkrl.config.sections import PowerOfTen, Section
from forkrl.errors import UserError

Recipe = TypeVar("Recipe", bound=Section)

REMOVED: dict[str, tuple[Any, str]] = {
    "rollout.cuda_graphs": (False, 'was removed before version 0.1.0; rollout.engine = "vllm" is for a GPU'),
}
"""Settings that no longer exist: the default that each had, and what to say of one that is set."""


def load_recipe(
    schema: type[Recipe], path: str | Path | None, overrides: Sequence[str] = (), *, base: Recipe | None = None
) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        schema: ``TrainConfig`` or ``SftConfig``.
        path: a TOML file; None: ``base``, or the defaults.
        overrides: each ``section.key=value``; the value is TOML, a bare word is a string, and an empty value restores
            the default.
        base: the recipe to override when there is no file.

    Raises:
        UserError: names the file or "command line", the key, the value and the remedy.
    """
    values = read_toml(Path(path)) if path is not None else recipe_toml(base) if base is not None else {}
    if values.pop("provenance", None) is not None:  # the config.toml of a run is a recipe too
        values = without_removed(values)
    overridden = copy.deepcopy(values)
    for override in overrides:
        key, value = _parse_override(override)
        try:  # the command line is recorded, so also if a later override replaces this one
            reject_written_secrets(key, value)
        except ValueError as error:
            raise UserError(f"command line: {error}") from None
        _set(overridden, key, value)
    faults = _faults(schema, overridden)
    if path is not None and faults:
        _require_recipe_of(schema, values, path)
        without_overrides = _faults(schema, values)
        sources: dict[str, list[str]] = {}
        for fault in faults:
            sources.setdefault(str(path) if fault in without_overrides else "command line", []).append(fault)
        raise UserError("; ".join(f"{source}: {'; '.join(found)}" for source, found in sources.items()))
    return parse_recipe(schema, overridden, "command line")


def parse_recipe(schema: type[Recipe], values: dict[str, Any], source: str) -> Recipe:
    """Validate a table of values; errors name ``source`` and the key."""
    if faults := _faults(schema, values):
        raise UserError(f"{source}: " + "; ".join(faults))
    return schema.model_validate(values)


def without_removed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run stored, without removed ones at their default, which changed nothing."""
    kept = copy.deepcopy(dict(values))
    for key, (default, _) in REMOVED.items():
        section, _, name = key.partition(".")
        table = kept.get(section)
        if isinstance(table, dict) and name in table and table[name] == default:
            del table[name]
    return kept


def change_recipe(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values, by key (``{"training.steps": 60}``)."""
    values = recipe_toml(recipe)
    for key, value in changes.items():
        _set(values, key, value)
    return parse_recipe(type(recipe), values, "changes")


def recipe_differences(old: Section, new: Section) -> list[str]:
    """``key: old -> new`` for every setting that differs, in recipe order."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    changed = [key for key in {**after, **before} if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in changed]


def recipe_toml(recipe: Section) -> dict[str, Any]:
    """The recipe as plain values for TOML, without the settings that are None."""
    return recipe.model_dump(mode="json", exclude_none=True)


def settings_of(schema: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Key and field of every setting, and of the additional settings of listed tables (``task.parts.weight``)."""
    for name, field in schema.model_fields.items():
        key = prefix + name
        if (section := section_of(field)) is not None:
            yield from settings_of(section, f"{key}.")
            continue
        yield key, field
        if (listed := item_section(field.annotation)) is not None and not issubclass(schema, listed):
            yield from ((f"{key}.{own}", inner) for own, inner in own_fields(listed).items())


def section_of(field: FieldInfo) -> type[Section] | None:
    """The table that a field holds; None for a setting."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def item_section(annotation: Any) -> type[Section] | None:
    """The kind of table that a setting lists, as ``task.parts`` does; None for other settings."""
    kind = next(iter(get_args(annotation)), None)
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def own_fields(listed: type[Section]) -> dict[str, FieldInfo]:
    """The fields of a listed table that the section it extends does not have."""
    return {name: field for name, field in listed.model_fields.items() if name in listed.__annotations__}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested tables by full key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def read_toml(path: Path, what: str = "recipe") -> dict[str, Any]:
    """The values of a TOML file; ``what`` it is, for errors."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"), parse_float=_parse_float)
    except FileNotFoundError:
        hint = "shipped ones are in recipes/" if what == "recipe" else "shipped ones are in studies/"
        if what == "recipe" and path.suffix != ".toml":
            hint = "a setting is written section.key=value, without spaces around ="
        raise UserError(f"{path}: no such {what}; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a {what} ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def _parse_float(text: str) -> float:
    return float(text) if "." in text or not float(text).is_integer() else PowerOfTen(text)


def _require_recipe_of(schema: type[Section], values: dict[str, Any], path: str | Path) -> None:
    """Report in one sentence that a file is a recipe for the other command."""
    command, other, fits = ("train", "sft", SftConfig) if schema is TrainConfig else ("sft", "train", TrainConfig)
    if not values.keys() <= schema.model_fields.keys() and values.keys() <= fits.model_fields.keys():
        raise UserError(f"{path}: this is a recipe for `forkrl {other}`, not for `forkrl {command}`")


def _parse_override(override: str) -> tuple[str, Any]:
    """Key and value of ``a.b=value``; None for an empty value."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{override!r} is not an override; write section.key=value, as in optimizer.lr=1e-5")
    try:
        value = tomllib.loads(f"value = {text}", parse_float=_parse_float)["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return key.strip(), value if text.strip() else None


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
    """Everything that is wrong with a table of values, one phrase each."""
    try:
        schema.model_validate(values)
    except ValidationError as error:
        return [_explain(schema, item) for item in error.errors()]
    return []


def _explain(schema: type[Section], item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        if key in REMOVED:
            return f"{key} {REMOVED[key][1]}"
        nearest = _nearest_key(schema, key)
        return f"{key} is not a setting" + (f"; did you mean {nearest}?" if nearest else "")
    message = str(item["msg"]).removeprefix("Value error, ").replace("valid tuple", "list")
    if not key or (item["type"] == "value_error" and "." in message.split(" ")[0]):
        return f"{key}: {message}" if key[-1:].isdigit() else message  # for a list of tables, name the table
    return f"{key} = {item['input']!r}: {message[0].lower() + message[1:]}"


def _nearest_key(schema: type[Section], key: str) -> str | None:
    """The setting or section most likely meant: the same name in another section, else the closest spelling."""
    known: dict[str, None] = {}
    for setting, field in settings_of(schema):
        parts = setting.split(".")
        known |= dict.fromkeys(".".join(parts[:length]) for length in range(1, len(parts) + 1))
        if listed := item_section(field.annotation):
            known |= dict.fromkeys(f"{setting}.{name}" for name in listed.model_fields)
    key = ".".join(part for part in key.split(".") if not part.isdigit())  # task.parts.0.x
    name = key.rpartition(".")[2]
    moved = [candidate for candidate in known if candidate.rpartition(".")[2] == name]
    return next(iter(moved or difflib.get_close_matches(key, known, n=1)), None)
