"""From files and overrides to a validated configuration, and from a refusal to one sentence."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from moe.config.schema import Config, ConfigError


def load(files: list[str], overrides: list[str] | None = None) -> Config:
    """Read TOML files (later wins, lists replaced whole), apply `--a.b.c value` overrides, validate.

    Raises ConfigError. `run.name` defaults to the stem of the last file.
    """
    if not files:
        raise ConfigError("--config is missing: name at least one TOML file, for example --config configs/tiny.toml")
    tree: dict[str, Any] = {}
    for file in files:
        layer = _read_toml(file)
        _forget_rate(tree, layer)
        _merge(tree, layer)
    parsed = _parse_overrides(overrides or [])
    _forget_rate(
        tree, {"balance": {path[1]: value for path, value in parsed if path[0] == "balance" and len(path) == 2}}
    )
    for path, value in parsed:
        _set(tree, path, value)
    if isinstance(run := tree.setdefault("run", {}), dict):
        run.setdefault("name", Path(files[-1]).stem)
    return validate(tree)


def validate(tree: dict[str, Any]) -> Config:
    """Build the schema from plain nested dicts; every problem becomes a one-sentence ConfigError."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(sentence(error)) from None


def _read_toml(file: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config {file} does not exist: name a TOML file, for example configs/tiny.toml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} cannot be read ({error}): name a readable TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--config {file} is not valid TOML ({error}): correct that line") from None


def _merge(into: dict[str, Any], tree: dict[str, Any]) -> None:
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _forget_rate(tree: dict[str, Any], layer: dict[str, Any]) -> None:
    # A rate is meant for its method: a later file or override that names another method starts from that one's default.
    old, new = tree.get("balance"), layer.get("balance")
    if isinstance(old, dict) and isinstance(new, dict) and new.get("method", old.get("method")) != old.get("method"):
        old.pop("rate", None)


def _parse_overrides(words: list[str]) -> list[tuple[list[str], Any]]:
    # Parsed here rather than by tyro, whose errors are boxes of several lines and whose unions of sections are
    # sub-commands: values are TOML values and meet the same validation, with the same sentences, as the files.
    found = []
    words = list(words)
    while words:
        flag = words.pop(0)
        if not flag.startswith("--") or len(flag) < 3:
            raise ConfigError(f"the argument {flag!r} is not understood: overrides look like --train.steps 100")
        flag, equals, text = flag.partition("=")
        if not equals:
            if not words or (words[0].startswith("--") and len(words[0]) > 2):
                raise ConfigError(f"{flag} has no value: write {flag} VALUE (for a switch true or false)")
            text = words.pop(0)
        found.append((flag[2:].replace("-", "_").split("."), _toml_value(text)))
    return found


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if text in ("True", "False"):
            return text == "True"
        return text


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--{'.'.join(path)} is not a setting: {key} is a value, not a section")
    tree[path[-1]] = value


# -- sentences -------------------------------------------------------------------------------------------------------


def _fields_at(path: tuple[Any, ...]) -> dict[str, FieldInfo]:
    fields = Config.model_fields
    for key in path:
        annotation = fields[key].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return {}
        fields = annotation.model_fields
    return fields


def sentence(error: ValidationError, section: tuple[str, ...] = ()) -> str:
    """The first problem in one sentence; section: where in Config the validated object stands."""
    first = error.errors()[0]
    where, value, context = section + first["loc"], first["input"], first.get("ctx", {})
    if where[:2] == ("balance", "rate"):
        where = where[:2]  # without the branch of the union
    path = ".".join(str(key) for key in where)
    match first["type"]:
        case "extra_forbidden":
            known = list(_fields_at(where[:-1]))
            near = difflib.get_close_matches(str(where[-1]), known, n=1, cutoff=0.5)
            hint = (
                f"did you mean {'.'.join([*map(str, where[:-1]), near[0]])}?"
                if near
                else f"known here: {', '.join(known)}"
            )
            return f"{path} = {value!r} is not a setting: {hint}"
        case "missing":
            return f"{path} is missing: set it in the configuration file or with --{path} VALUE"
        case "literal_error":
            choices = [c.strip(" '") for c in context["expected"].replace(" or ", ", ").split(",")]
            near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]}?)" if near else ""
            return f"{path} = {value!r} is not known{hint}: choose one of {', '.join(choices)}"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            sign = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}[
                first["type"]
            ]
            bound = context.get("gt", context.get("ge", context.get("lt", context.get("le"))))
            return f"{path} = {value!r} is out of range: it must be {sign} {bound:g}"
        case "finite_number":
            return f"{path} = {value!r} is not finite: give a number"
        case (
            "int_type"
            | "float_type"
            | "bool_type"
            | "string_type"
            | "dict_type"
            | "model_type"
            | "model_attributes_type"
        ):
            kind = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text in quotes"}
            wanted = kind.get(first["type"].removesuffix("_type"), "a section with settings of its own")
            return f"{path} = {value!r} has the wrong type: it must be {wanted}"
        case _:
            return f"{path} = {value!r} is refused: {first['msg'][0].lower()}{first['msg'][1:]}"
