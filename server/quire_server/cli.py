"""``quire serve``: the flags, what is printed, and the way into the event loop."""

from __future__ import annotations

import argparse
import json
import logging
import socket
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli.engine_args import add_engine_arguments, engine_config
from quire.logs import LOG_FORMATS
from quire_server.keys import API_KEY_VARIABLE, add_key_arguments, keys_from
from quire_server.limits import add_limit_arguments, limits_from
from quire_server.network import add_network_arguments, allow_open_files, network_from

if TYPE_CHECKING:
    from quire_server.state import Server, Settings

HELP = "serve a model over an OpenAI-compatible HTTP API"
logger = logging.getLogger("quire.server")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from quire_server.batch_settings import add_batch_arguments
    from quire_server.openai.responses_store import add_store_arguments

    parser.add_argument(
        "model", nargs="?", default="demo", metavar="MODEL", help="folder, registered name or hub name (demo)"
    )
    group = parser.add_argument_group("server")
    group.add_argument(
        "--config", metavar="FILE", help="a .toml or .yaml file of these flags; the command line beats it"
    )
    group.add_argument(
        "--dump-config", action="store_true", help="print the configuration in force as TOML for --config, and end"
    )
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (%(default)s); 0.0.0.0 for every interface"
    )
    group.add_argument("--port", type=int, default=8000, help="port to listen on (%(default)s); 0 for any free one")
    add_answer_arguments(group)
    group.add_argument(
        "--drain-timeout", type=float, default=60.0, help="seconds for open requests after SIGTERM (%(default)s)"
    )
    group.add_argument(
        "--health-timeout", type=float, default=5.0, help="seconds in which the engine must answer (%(default)s)"
    )
    group.add_argument(
        "--log-format",
        default="text",
        choices=LOG_FORMATS,
        help="how the log of both processes looks: lines for people, or a JSON object a line (%(default)s)",
    )
    group.add_argument(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="send an OpenTelemetry span for each request there, e.g. http://localhost:4318/v1/traces (extra: otel)",
    )
    group.add_argument(
        "--log-requests",
        "--enable-log-requests",
        action="store_true",
        help="log what is asked, prompts included (off: no log holds anything of a prompt or an answer)",
    )
    group.add_argument(
        "--max-log-len", type=int, default=1000, help="characters or token ids of a prompt in the log (%(default)s)"
    )
    group.add_argument("--disable-access-log", action="store_true", help="no log line for each request")
    group.add_argument(
        "--uvicorn-log-level",
        default="warning",
        choices=["critical", "error", "warning", "info", "debug"],
        help="what the HTTP layer itself logs (%(default)s)",
    )
    add_key_arguments(parser)
    add_network_arguments(parser)
    add_limit_arguments(parser)
    add_batch_arguments(parser)
    add_store_arguments(parser)
    add_engine_arguments(parser)


def add_answer_arguments(group: argparse._ArgumentGroup) -> None:
    """What shapes the answers, over HTTP and in ``quire run-batch``."""
    group.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", help="names of the model in the API (MODEL's last part)"
    )
    group.add_argument("--chat-template", metavar="FILE", help="a Jinja template instead of the checkpoint's")
    group.add_argument(
        "--trust-request-chat-template", action="store_true", help="let a request bring a chat template of its own"
    )
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


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The command line, over the file that it names. Raises ConfigError."""
    from quire_server.config_file import parse

    return parse(parser, add_arguments, argv)


def run(args: argparse.Namespace) -> int:
    """Bind, then load, then serve. Returns the exit status."""
    if args.dump_config:
        from quire_server.config_file import dump

        _settings(args), engine_config(args)  # refuse what would be refused
        print(dump(args, add_arguments))
        return 0
    from quire.errors import ConfigError
    from quire.logs import set_up
    from quire_server.serve import bind, serve

    set_up(args.log_format, "server")
    settings = _settings(args)
    config = replace(engine_config(args), log_format=args.log_format)
    if getattr(config, "skip_tokenizer_init", False):
        raise ConfigError("skip_tokenizer_init: a server speaks text, so it needs the tokenizer")
    network = settings.network
    allow_open_files(network.max_connections)
    listener = bind(args.host, args.port)
    metrics = bind(network.metrics_host, network.metrics_port) if network.metrics_port is not None else None
    from quire.engine.async_llm import AsyncLLM

    work = serve(
        AsyncLLM(config, settings.limits.of_engine()),
        settings,
        listener,
        metrics_listener=metrics,
        drain_timeout=args.drain_timeout,
        log_level=args.uvicorn_log_level,
        on_ready=lambda server: _announce(server, address(listener, args.host, network.scheme), args.log_format),
    )
    return in_loop(work)


def in_loop(work: Coroutine[Any, Any, int]) -> int:
    try:
        import uvloop
    except ImportError:  # not on Windows
        import asyncio

        return asyncio.run(work)
    return uvloop.run(work)


def _announce(server: Server, base: str, log_format: str) -> None:
    """To a person, with something to try; to a program, as a line of the log like any other."""
    if log_format == "json":
        names = ", ".join(server.settings.model_names)
        if server.engine.info.report:
            logger.info("%s", server.engine.info.report)
        logger.info("Quire serves %s on %s", names, base, extra={"model": server.settings.model_names[0]})
    else:
        print(banner(server, base), flush=True)


def _settings(args: argparse.Namespace) -> Settings:
    from quire_server.batch_settings import batch_settings
    from quire_server.openai.responses_store import store_settings

    return replace(
        answer_settings(args),
        **keys_from(args),
        network=network_from(args),
        batches=batch_settings(args),
        store=store_settings(args),
        health_timeout=args.health_timeout,
        access_log=not args.disable_access_log,
        log_requests=args.log_requests,
        max_log_len=max(args.max_log_len, 0),
        otlp_traces_endpoint=args.otlp_traces_endpoint,
    )


def answer_settings(args: argparse.Namespace) -> Settings:
    """What :func:`add_answer_arguments` and the limits of a request say."""
    from quire.errors import ConfigError
    from quire_server.parsers import NONE, Parsers
    from quire_server.state import Settings

    template = None
    if args.chat_template is not None:
        try:
            template = Path(args.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat-template {args.chat_template}: {error}") from None
    return Settings(
        model_names=tuple(args.served_model_name or [default_name(args.model)]),
        limits=limits_from(args),
        response_role=args.response_role,
        chat_template=template,
        parsers=Parsers(
            args.tool_call_parser if args.enable_auto_tool_choice else NONE, args.reasoning_parser, args.plugins
        ),
        trust_request_chat_template=args.trust_request_chat_template,
    )


def default_name(model: str) -> str:
    """A folder is served under its own name, not under where it lies; a registered or hub name as it is."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def address(listener: socket.socket, host: str, scheme: str = "http") -> str:
    """The base address as one types it on this machine."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"{scheme}://{f'[{shown}]' if ':' in shown else shown}:{listener.getsockname()[1]}"


def banner(server: Server, base: str) -> str:
    """Where it serves, and two ways to try it that work when pasted."""
    model = server.settings.model_names[0]
    guarded = bool(server.keys)
    report = server.engine.info.report
    if server.text.template() is not None:
        route, body = (
            "chat/completions",
            {"model": model, "messages": [{"role": "user", "content": "What is the capital of France?"}]},
        )
        call = (
            f"client.chat.completions.create(model={model!r}, messages={body['messages']!r}).choices[0].message.content"
        )
    else:
        route, body = "completions", {"model": model, "prompt": "The capital of France is"}
        call = f"client.completions.create(model={model!r}, prompt={body['prompt']!r}).choices[0].text"
    header = f' -H "Authorization: Bearer ${API_KEY_VARIABLE}"' if guarded else ""
    key = f"__import__('os').environ['{API_KEY_VARIABLE}']" if guarded else "'none'"
    data = json.dumps(body).replace("'", "'\\''")
    lines = [
        *([report] if report else []),
        "",
        f"Quire serves {model} on {base}"
        + (f" (put your API key into ${API_KEY_VARIABLE} for these)" if guarded else ""),
        "",
        f"curl {base}/v1/{route} -H 'Content-Type: application/json'{header} -d '{data}'",
        "",
        "from openai import OpenAI",
        f"client = OpenAI(base_url='{base}/v1', api_key={key})",
        f"print({call})",
        "",
    ]
    return "\n".join(lines)
