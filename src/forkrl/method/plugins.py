"""Loads masks, weights and objectives: built-in ones by name, those of users as "module:function"."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from forkrl.errors import UserError, first_line


def load_method(setting: str, name: str, path: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    """The function at ``path`` with its options bound.

    Args:
        setting: the recipe's key that names it, such as "selection.rule".
        name: what the recipe names it.
        path: "module:function".
        options: keyword arguments, from the table next to ``setting``.

    Raises:
        UserError: it cannot be imported, or has no such option.
    """
    return functools.partial(_load(setting, name, path), **_checked(setting, name, _load(setting, name, path), options))


@functools.cache
def _load(setting: str, name: str, path: str) -> Callable[..., Any]:
    module, _, attribute = path.partition(":")
    try:
        function: Any = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a user's module may raise anything
        raise UserError(
            f'{setting} = "{name}" cannot be imported ({type(error).__name__}: {first_line(error)})'
        ) from error
    if not callable(function):
        raise UserError(f'{setting} = "{name}" is a {type(function).__name__}, not a function of signals')
    return function  # type: ignore[no-any-return]


def _checked(setting: str, name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> Mapping[str, Any]:
    table = f"{setting.partition('.')[0]}.options"
    parameters = inspect.signature(function).parameters.values()
    known = {each.name: each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}
    for key in options:
        if key not in known:
            has = f"its options: {', '.join(known)}" if known else "it has none"
            raise UserError(f'{table}.{key}: {setting} = "{name}" has no such option; {has}')
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in options:
            raise UserError(f'{setting} = "{name}" needs {table}.{key}')
    return options
