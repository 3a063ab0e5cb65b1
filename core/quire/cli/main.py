"""The ``quire`` command. Each subcommand is a module that is imported only when it runs, so that help is instant."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

COMMANDS = {
    "serve": ("quire_server.cli", "serve a model over an OpenAI-compatible HTTP API", "quire-server"),
    "run-batch": ("quire_server.run_batch", "run a file of requests, without HTTP", "quire-server"),
    "api-key": ("quire_server.api_key", "make a key for the server's --api-key-file", "quire-server"),
    "chat": ("quire.cli.chat", "chat in the terminal, with a local model or a server", ""),
    "top": ("quire.cli.top", "watch a running server: queue, batch, pages, tokens/s", ""),
    "plugins": ("quire.cli.plugins", "list what plugins register, and what is wrong with those refused", ""),
    "doctor": ("quire.cli.doctor", "check every device: memory, dtypes, a computation, native operations", ""),
    "conformance": ("quire.cli.conformance", "hold a device to the contract", ""),
    "bench": ("quire.cli.bench", "measure latency, throughput or a running server", ""),
}


def build_parser() -> argparse.ArgumentParser:
    from quire import __version__

    listing = "\n".join(f"  {name:<12} {text}" for name, (_, text, _) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="quire",
        description="Serve large language models from a paged KV cache.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"commands:\n{listing}\n\n`quire COMMAND --help` says what each takes.",
    )
    parser.add_argument("--version", action="version", version=f"quire {__version__}")
    parser.add_argument(
        "--plugins",
        metavar="A,B",
        help="load only these plugins (default: the variable QUIRE_PLUGINS, else all that are installed)",
    )
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status. A user's mistake ends in one line, not a stack trace."""
    args = build_parser().parse_args(argv)
    module_name, text, distribution = COMMANDS[args.command]
    if find_spec(module_name.split(".")[0]) is None:
        print(f"quire {args.command} is in another package: pip install {distribution}", file=sys.stderr)
        return 2
    module = import_module(module_name)
    from quire.errors import UserError

    try:
        parsed = _parse(module, f"quire {args.command}", text, args.arguments)
        parsed.plugins = tuple(name for name in args.plugins.split(",") if name) if args.plugins is not None else None
        return int(module.run(parsed) or 0)
    except UserError as error:
        print(f"quire {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parse(module: ModuleType, prog: str, text: str, argv: list[str]) -> argparse.Namespace:
    """A command that takes its flags from elsewhere too has a ``parse`` of its own. Raises UserError."""
    parser = argparse.ArgumentParser(prog=prog, description=text)
    if hasattr(module, "parse"):
        parsed: argparse.Namespace = module.parse(parser, argv)
        return parsed
    module.add_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
