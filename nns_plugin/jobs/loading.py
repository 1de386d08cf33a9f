"""Loads a recipe: reads YAML, applies overrides, checks fields and calls factories; every error is one line."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nns_plugin.errors import MissingExtraError, NNSError, RecipeError
from nns_plugin.jobs.recipe import WEIGHTS, Recipe
from nns_plugin.subnets.options import SELECTIONS, TARGETS, TOGETHER

try:
    import yaml
    from pydantic import ValidationError
except ModuleNotFoundError as error:
    raise MissingExtraError(error.name or "yaml", "cli") from error


def default_recipe() -> dict[str, Any]:
    """The default recipe: scikit-learn's handwritten digits, labels 3 and 5."""
    return {
        "model": {"factory": "nns_plugin.jobs.models:digits_classifier"},
        "data": {"factory": "nns_plugin.jobs.data:digits"},
        "labels": ["3", "5"],
        "ratio": 0.45,
        "round_to": 8,
        "train": {"epochs": 6},
    }


def load_recipe(path: Path | None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe, or take the default one, apply overrides and check it.

    Args:
        path: A YAML file; paths of weights in it are relative to its folder. The default recipe if ``None``.
        overrides: Values by dotted field name, such as ``{"measure.threads": 2}``; an override of ``ratio``,
            ``zeta``, ``angle`` or ``max_balanced_accuracy_drop`` replaces the others.

    Raises:
        RecipeError: One line that names the field, what was found and what is allowed.
    """
    source = "recipe" if path is None else str(path)
    content = default_recipe() if path is None else _read(path)
    if "criterion" in content and isinstance(content["criterion"], str):
        content["criterion"] = {"name": content["criterion"]}
    given = {name.partition(".")[0] for name in overrides or {}}
    for name, value in (overrides or {}).items():
        top = name.partition(".")[0]
        for other in (*SELECTIONS, "confidence", "roundings") if top in SELECTIONS else ():
            if other not in given and other != top and not {other, top} <= TOGETHER:
                content.pop(other, None)
        if top in TARGETS and "round_to" not in given:
            content.pop("round_to", None)
        _set(content, name.split("."), value, source)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{source}: {_describe(error)}") from None
    if all(getattr(recipe, name) is None for name in SELECTIONS):
        recipe = recipe.model_copy(update={"ratio": 0.5})
    if path is not None:
        files = {name: getattr(recipe.model, name) for name in WEIGHTS}
        found = {name: path.parent / file for name, file in files.items() if file is not None}
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=found)})
    return recipe


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Parse overrides such as ``angle.similar=20``; the value is read as YAML.

    Raises:
        RecipeError: If a text is malformed.
    """
    found: dict[str, Any] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or not all(part.isidentifier() for part in name.split(".")):
            raise RecipeError(f"--set: found {text!r}; expected FIELD=VALUE, such as angle.similar=20")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(
                f"--set: the value of {text!r} is not valid YAML: {' '.join(str(error).split())}"
            ) from error
    return found


def call_factory(field: str, reference: str, arguments: Mapping[str, Any]) -> Any:
    """Import ``package.module:callable`` and call it.

    Raises:
        RecipeError: If it cannot be imported, is not callable, or raises.
    """
    module_name, _, path = reference.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for name in path.split("."):
            found = getattr(found, name)
    except (Exception, SystemExit) as error:  # importing runs user code
        raise RecipeError(f"{field}: {reference!r} cannot be imported: {_one_line(error)}") from error
    if not isinstance(found, Callable):  # type: ignore[arg-type]
        raise RecipeError(f"{field}: {reference!r} is a {type(found).__name__}; expected a callable")
    try:
        return found(**arguments)
    except NNSError:
        raise
    except (Exception, SystemExit) as error:
        raise RecipeError(f"{field}: {reference!r} called with {dict(arguments)} raised {_one_line(error)}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: contains a {type(content).__name__}; expected fields such as model, data, labels")
    return content


def _set(content: dict[str, Any], path: list[str], value: Any, source: str) -> None:
    for name in path[:-1]:
        content = content.setdefault(name, {})
        if not isinstance(content, dict):
            raise RecipeError(f"{source}: field {name!r}: found {content!r}; expected a section")
    content[path[-1]] = value


def _describe(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "recipe"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"field {field!r}: found nothing; it is required"
    if first["type"] == "extra_forbidden":
        return f"field {field!r}: found {_short(first['input'])}; there is no such field"
    if first["type"] == "value_error" and not first["loc"]:
        return message
    return f"field {field!r}: found {_short(first['input'])}; {message[0].lower()}{message[1:]}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
