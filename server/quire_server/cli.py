"""``quire serve``: the flags, what is printed, and the way into the event loop."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import socket
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quire.cli.engine_args import add_engine_arguments, engine_config
from quire.logs import LOG_FORMATS
from quire_server.keys import API_KEY_VARIABLE, add_key_arguments, keys_from
from quire_server.limits import add_limit_arguments, limits_from
from quire_server.model_args import (
    add_answer_arguments,
    add_model_arguments,
    each_model,
    engine_configs,
    model_settings,
)
from quire_server.network import add_network_arguments, allow_open_files, network_from

if TYPE_CHECKING:
    from quire_server.state import Server, Settings

HELP = "serve a model over an OpenAI-compatible HTTP API"
logger = logging.getLogger("quire.server")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from quire_server.batch_settings import add_batch_arguments
    from quire_server.openai.responses_store import add_store_arguments

    add_model_arguments(parser)
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
    add_trust_argument(group)
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


def add_trust_argument(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--trust-request-chat-template", action="store_true", help="let a request bring a chat template of its own"
    )


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The command line, over the file that it names. Raises ConfigError."""
    from quire_server.config_file import parse

    return parse(parser, add_arguments, argv)


def run(args: argparse.Namespace) -> int:
    """Bind, then load, then serve. Returns the exit status."""
    from quire.errors import ConfigError

    models = each_model(args)
    if args.dump_config:
        from quire_server.config_file import dump

        _settings(args, models), [engine_config(model) for model in models]  # refuse what would be refused
        print(dump(args, add_arguments, models))
        return 0
    from quire.logs import set_up
    from quire_server.serve import bind, serve

    set_up(args.log_format, "server")
    settings = _settings(args, models)
    if any(getattr(model, "skip_tokenizer_init", False) for model in models):
        raise ConfigError("skip_tokenizer_init: a server speaks text, so it needs the tokenizer")
    network = settings.network
    allow_open_files(network.max_connections)
    listener = bind(args.host, args.port)
    metrics = bind(network.metrics_host, network.metrics_port) if network.metrics_port is not None else None
    from quire.engine.async_llm import AsyncLLM
    from quire.engine.spare import Spare

    configs, division = engine_configs(models)
    limits, spare = settings.limits.of_engine(), Spare()
    work = serve(
        [AsyncLLM(replace(config, log_format=args.log_format), limits, spare) for config in configs],
        settings,
        listener,
        metrics_listener=metrics,
        drain_timeout=args.drain_timeout,
        log_level=args.uvicorn_log_level,
        on_ready=lambda server: _ready(server, address(listener, args.host, network.scheme), args.log_format, division),
    )
    return in_loop(work)


def in_loop(work: Coroutine[Any, Any, int]) -> int:
    try:
        import uvloop
    except ImportError:  # not on Windows
        import asyncio

        return asyncio.run(work)
    return uvloop.run(work)


def _ready(server: Server, base: str, log_format: str, division: str) -> None:
    # What is loaded stays: the collector need not look at it again while streams wait, nor at every few hundred objects.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    _announce(server, base, log_format, division)


def _announce(server: Server, base: str, log_format: str, division: str = "") -> None:
    """To a person, with something to try; to a program, as a line of the log like any other."""
    if log_format == "json":
        names = ", ".join(name for model in server.models for name in model.settings.names)
        report = division or server.models[0].engine.info.report
        if report:
            logger.info("%s", report)
        logger.info("Quire serves %s on %s", names, base, extra={"model": server.models[0].name})
    else:
        print(banner(server, base, division), flush=True)


def _settings(args: argparse.Namespace, models: Sequence[argparse.Namespace] | None = None) -> Settings:
    """``models``: what :func:`each_model` says."""
    from quire_server.batch_settings import batch_settings
    from quire_server.openai.responses_store import store_settings

    models = each_model(args) if models is None else models
    return replace(
        answer_settings(args, models),
        **keys_from(args),
        network=network_from(args),
        batches=batch_settings(args, models),
        store=store_settings(args),
        health_timeout=args.health_timeout,
        access_log=not args.disable_access_log,
        log_requests=args.log_requests,
        max_log_len=max(args.max_log_len, 0),
        otlp_traces_endpoint=args.otlp_traces_endpoint,
    )


def answer_settings(args: argparse.Namespace, models: Sequence[argparse.Namespace]) -> Settings:
    """What the models' own flags and the limits of a request say."""
    from quire_server.state import Settings

    return Settings(
        models=tuple(map(model_settings, models)),
        limits=limits_from(args),
        trust_request_chat_template=args.trust_request_chat_template,
    )


def address(listener: socket.socket, host: str, scheme: str = "http") -> str:
    """The base address as one types it on this machine."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"{scheme}://{f'[{shown}]' if ':' in shown else shown}:{listener.getsockname()[1]}"


def banner(server: Server, base: str, division: str = "") -> str:
    """Where it serves, and two ways to try it that work when pasted. ``division``: of memory among several models."""
    first = server.models[0]
    model = first.name
    guarded = bool(server.keys)
    report = division or first.engine.info.report
    if first.text.template() is not None:
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
        f"Quire serves {', '.join(one.name for one in server.models)} on {base}"
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
