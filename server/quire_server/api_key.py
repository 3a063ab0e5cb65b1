"""``quire api-key``: a new random key, shown once, and the line for the server's file, which holds only its hash."""

from __future__ import annotations

import argparse
import sys

from quire_server.keys import digest_of, key_of_line, new_key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="whose key it is: what the log and the metrics call it")


def run(args: argparse.Namespace) -> int:
    key = new_key()
    line = f"{args.name}:{digest_of(key.encode()).hex()}"
    try:
        key_of_line(line)
    except ValueError as error:
        print(f"quire api-key: {error}", file=sys.stderr)
        return 2
    print(f"key, for the client; it is shown only now:\n{key}\n\nline, for --api-key-file:\n{line}")
    return 0
