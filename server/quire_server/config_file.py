"""``quire serve --config FILE``: the flags in a TOML or YAML file. What the command line says beats the file.

Keys are the flags' names, with dashes or underscores; a value has the flag's type. ``--dump-config`` prints such a file.
"""

from __future__ import annotations

import argparse
import difflib
import json
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quire.errors import ConfigError
from quire_server.model_args import names_of, own_flags

NOT_IN_FILE = {"help", "config", "dump_config", "model_flags"}
SECRETS = {"api_key", "ssl_keyfile_password"}  # never printed


AddArguments = Callable[[argparse.ArgumentParser], None]


def parse(parser: argparse.ArgumentParser, add_arguments: AddArguments, argv: list[str]) -> argparse.Namespace:
    """The command line over the file over the defaults. Raises ConfigError naming the file and the key.

    ``parser`` is new and ``add_arguments`` gives it its flags."""
    add_arguments(parser)
    defaults = parser.parse_args(argv)
    given = argparse.ArgumentParser(prog=parser.prog)
    add_arguments(given)
    given._defaults.clear()
    for action in given._actions:
        action.default = argparse.SUPPRESS
    flags = vars(given.parse_args(argv))  # those alone that the command line names
    if not flags.get("model", True):
        del flags["model"]
    values = {} if defaults.config is None else read(Path(defaults.config), parser)
    return argparse.Namespace(**{**vars(defaults), **values, **flags, "said": frozenset(flags)})


def read(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The file's values by the names that the flags have in a namespace, checked and converted as the flags are."""
    known = {action.dest: action for action in parser._actions if action.dest not in NOT_IN_FILE}
    found = _load(path)
    tables = found.pop("models", None)
    values = _values(path, found, known, "quire serve")
    if tables is not None:
        if "model" in values:
            raise ConfigError(f"--config {path}: model and models: give one of them")
        values["models"] = _models(path, tables, known["model"])
    return values


def _models(path: Path, tables: Any, model: argparse.Action) -> list[dict[str, Any]]:
    """``[[models]]``: a table for each."""
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"--config {path}: models: must be tables, [[models]] in TOML and a list of maps in YAML")
    known = {**own_flags(), "model": argparse.Action([], "model")}
    made = [_values(path, table, known, "one of several models") for table in tables]
    for place, values in enumerate(made):
        if "model" not in values:
            raise ConfigError(f"--config {path}: models[{place}]: model is missing: what is to be served")
    return made


def _values(path: Path, found: dict[Any, Any], known: dict[str, argparse.Action], whose: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        action = known.get(name)
        if action is None:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0].replace('_', '-')}?" if near else ""
            raise ConfigError(f"--config {path}: {key!r} is no flag of {whose}{hint}")
        if name in values:
            raise ConfigError(f"--config {path}: {key}: given twice")
        try:
            values[name] = _value(action, value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ConfigError(f"--config {path}: {key}: {error}") from None
    return values


def _load(path: Path) -> dict[Any, Any]:
    kind = path.suffix.lower()
    if kind not in (".toml", ".yaml", ".yml"):
        raise ConfigError(f"--config {path}: the name must end in .toml, .yaml or .yml")
    try:
        text = path.read_text(encoding="utf-8")
        found = tomllib.loads(text) if kind == ".toml" else _yaml(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"--config {path}: expected keys with values, found a {type(found).__name__}")
    return found


def _yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Plain values; a key given twice is a mistake, not the last one's victory."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            twice = {key for key in keys if keys.count(key) > 1}
            if twice:
                raise ValueError(f"{', '.join(sorted(twice))}: given twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader) or {}
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _value(action: argparse.Action, value: Any) -> Any:
    """``value`` as the flag takes it. Raises ValueError saying what it must be."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false, not {value!r}")
        return value
    if action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction):
        items = value if isinstance(value, list) else [value]
        if not items:
            raise ValueError("must not be an empty list")
        return [_one(action, item) for item in items]
    return _one(action, value)


def _one(action: argparse.Action, value: Any) -> Any:
    """One value in the file's own type; a flag with a notation of its own (4G, 32k) takes a number too."""
    kinds: dict[Any, tuple[tuple[type, ...], str]] = {
        int: ((int,), "a whole number"),
        float: ((int, float), "a number"),
        None: ((str,), "a string"),
        str: ((str,), "a string"),
    }
    allowed, said = kinds.get(action.type, ((int, float, str), "a number or a string"))
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise ValueError(f"must be {said}, not {value!r}")
    converted = action.type(str(value)) if callable(action.type) else value
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"must be one of {', '.join(map(str, action.choices))}, not {value!r}")
    return converted


def dump(args: argparse.Namespace, add_arguments: AddArguments, models: Sequence[argparse.Namespace]) -> str:
    """The effective configuration as TOML that ``--config`` takes; what has the value of its default is marked. Of several
    ``models`` (those of model_args.each_model) each has a table of what it does not share with all."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    lines = []
    for action in parser._actions:
        name, value = action.dest, getattr(args, action.dest, None)
        if name in NOT_IN_FILE or (name == "model" and len(models) > 1):
            continue
        key = name.replace("_", "-")
        if name in SECRETS:
            lines.append(f"# {key}: {'given, not shown' if value else 'not set'}")
        elif value is None:
            lines.append(f"# {key}: not set")
        else:
            lines.append(
                f"{key} = {json.dumps(value, ensure_ascii=False)}" + ("  # default" if value == action.default else "")
            )
    for model in models if len(models) > 1 else ():
        own = {"served_model_name": list(names_of(model))} | {name: getattr(model, name) for name in sorted(model.own)}
        lines += ["", "[[models]]", f"model = {json.dumps(model.model)}"]
        lines += [f"{name.replace('_', '-')} = {json.dumps(value, ensure_ascii=False)}" for name, value in own.items()]
    return "\n".join(lines)
