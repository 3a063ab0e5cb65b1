"""Which models a command serves, and with what: one namespace of flags for each.

``quire serve A B`` serves two; ``NAME=A`` names one. What is of one model (the engine's flags, and how its answers are
read) may be said for all of them, for one by ``--model-flags "NAME=--flag value"``, and in a file as ``[[models]]``. The
nearer beats the farther: ``--model-flags``, then a flag of the command line, then ``[[models]]``, then the rest of the file.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from quire.cli.engine_args import add_engine_arguments, engine_config
from quire.errors import ConfigError

if TYPE_CHECKING:
    from quire.config import EngineConfig
    from quire_server.model import ModelSettings


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL ... and what says which flags are whose."""
    parser.add_argument(
        "model",
        nargs="*",
        default=["demo"],
        metavar="MODEL",
        help="folder, registered name or hub name (demo); several are served at once; NAME=MODEL names one in the API",
    )
    parser.add_argument(
        "--model-flags",
        action="append",
        metavar="NAME=FLAGS",
        help='flags of one of several models, e.g. "small=--max-model-len 4k --quantization int8"; may be repeated',
    )
    parser.set_defaults(models=(), said=frozenset())  # of a file, and which flags the command line names


def add_answer_arguments(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """How a model's answers are made and read."""
    group.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", help="names of the model in the API (MODEL's last part)"
    )
    group.add_argument("--chat-template", metavar="FILE", help="a Jinja template instead of the checkpoint's")
    group.add_argument(
        "--tool-call-parser",
        default="auto",
        metavar="NAME",
        help="how tool calls are read from answers: a name of docs/tool-calling.md, 'none', or 'auto': by the marks in the "
        "chat template (%(default)s)",
    )
    group.add_argument(
        "--reasoning-parser",
        default="auto",
        metavar="NAME",
        help="how reasoning is told from the answer: a name, 'none' or 'auto', as above (%(default)s)",
    )
    group.add_argument(
        "--enable-auto-tool-choice",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read tool calls when tool_choice is 'auto' (on, unlike in vLLM; --no-enable-auto-tool-choice leaves the text)",
    )
    group.add_argument("--response-role", default="assistant", help="role of the answers (%(default)s)")


class _OwnFlags(argparse.ArgumentParser):
    """The flags that one model may have for itself."""

    def __init__(self) -> None:
        super().__init__(prog="--model-flags", add_help=False, argument_default=argparse.SUPPRESS)
        add_answer_arguments(self)
        add_engine_arguments(self)
        for action in self._actions:
            action.default = argparse.SUPPRESS

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"--model-flags: {message}")


def own_flags() -> dict[str, argparse.Action]:
    """By the names that they have in a namespace."""
    return {action.dest: action for action in _OwnFlags()._actions}


def each_model(args: argparse.Namespace) -> list[argparse.Namespace]:
    """What each model is served with; ``model`` is a text in each. Raises ConfigError."""
    given: Sequence[Mapping[str, Any]] = args.models
    if not given or "model" in args.said:
        given = [{"model": model} for model in args.model or ["demo"]]
    own = own_flags()
    said = {name: value for name, value in vars(args).items() if name in args.said and name in own}
    if len(given) > 1 and args.served_model_name:
        raise ConfigError(
            "--served-model-name names one model: with several, use NAME=MODEL, --model-flags or [[models]]"
        )
    made = []
    for entry in given:
        values = {**vars(args), **entry, **said, "model_flags": None, "models": ()}
        name, named, model = str(entry["model"]).partition("=")
        if named and name and model and "/" not in name and not Path(entry["model"]).is_dir():
            values["model"] = model
            values["served_model_name"] = values["served_model_name"] or [name]
        values["own"] = {key for key in entry if key in own and key not in said}
        made.append(argparse.Namespace(**values))
    if args.model_flags:
        _apply(args.model_flags, made)
    _check_names(made)
    return made


def _apply(texts: Sequence[str], models: Sequence[argparse.Namespace]) -> None:
    parser, by_name = _OwnFlags(), {name: one for one in models for name in names_of(one)}
    for text in texts:
        name, _, flags = text.partition("=")
        if name not in by_name:
            raise ConfigError(f"--model-flags {text}: {name!r} is none of the models {', '.join(by_name)}")
        try:
            words = shlex.split(flags)
        except ValueError as error:
            raise ConfigError(f"--model-flags {text}: {error}") from None
        found = vars(parser.parse_args(words))
        vars(by_name[name]).update(found)
        by_name[name].own |= set(found)


def _check_names(models: Sequence[argparse.Namespace]) -> None:
    seen: set[str] = set()
    for one in models:
        for name in names_of(one):
            if name in seen:
                raise ConfigError(
                    f"two models are named {name!r}: name them by NAME=MODEL or, in a file, served-model-name"
                )
            seen.add(name)


def names_of(args: argparse.Namespace) -> tuple[str, ...]:
    """The first is the model's own; the others are aliases. A folder is served under its own name, not under where it
    lies; a registered or hub name as it is."""
    if args.served_model_name:
        return tuple(args.served_model_name)
    return (Path(args.model).resolve().name if Path(args.model).is_dir() else args.model,)


def model_settings(args: argparse.Namespace) -> ModelSettings:
    """Of one of :func:`each_model`. Raises ConfigError."""
    from quire_server.model import ModelSettings
    from quire_server.parsers import NONE, Parsers

    template = None
    if args.chat_template is not None:
        try:
            template = Path(args.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat-template {args.chat_template}: {error}") from None
    tool = args.tool_call_parser if args.enable_auto_tool_choice else NONE
    return ModelSettings(
        names=names_of(args),
        chat_template=template,
        parsers=Parsers(tool, args.reasoning_parser, args.plugins),
        response_role=args.response_role,
    )


def engine_configs(models: Sequence[argparse.Namespace]) -> tuple[list[EngineConfig], str]:
    """The engines' configurations and, of several, how memory and cores are divided among them, as text.

    Raises UserError; DoesNotFit, with the numbers, when they do not fit together.
    """
    if len(models) == 1:
        return [engine_config(models[0])], ""
    from quire.engine.division import divided

    # Said for all, the share of the device's memory is what they have together.
    whole = next((one.gpu_memory_utilization for one in models if "gpu_memory_utilization" not in one.own), None)
    for one in models:
        if "gpu_memory_utilization" not in one.own:
            one.gpu_memory_utilization = None
    division = divided([engine_config(one) for one in models], [names_of(one)[0] for one in models], whole)
    return division.configs, division.report
