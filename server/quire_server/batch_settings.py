"""Where files and batches are kept, and how much of them. Every field with a help text is a flag of ``quire serve``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from quire.errors import ConfigError


def _flag(default: int, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class BatchSettings:
    data_dir: str | None = None  # None: a temporary folder, which goes with the server
    concurrency: int = 64  # sequences of batches that the engine has at once
    window: float = 86400.0  # seconds of the one completion window that there is, "24h"
    max_file_bytes: int = _flag(200 * 2**20, "bytes of an uploaded file")
    max_files: int = _flag(1000, "files that are kept; with so many, uploads and new batches are refused")
    max_total_file_bytes: int = _flag(10 * 2**30, "bytes of all files; with so many, batches pause too")
    upload_timeout: float = _flag(600, "seconds in which an upload must have arrived")
    max_batch_lines: int = _flag(50_000, "requests in one batch")
    max_batches: int = _flag(1000, "batches that are remembered: for a new one the oldest that has ended is forgotten")

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "data_dir" and value <= 0:
                name = "batch_concurrency" if item.name == "concurrency" else item.name
                raise ConfigError(f"--{name.replace('_', '-')} must be above 0, not {value}")


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("files and batches (docs/batches.md)")
    group.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder for uploaded files and batches, which go on after a restart "
        "(default: a temporary one, deleted when the server ends)",
    )
    group.add_argument(
        "--batch-concurrency",
        type=int,
        metavar="N",
        help="sequences of batches that the engine has at once (default: a quarter of each model's --max-num-seqs; "
        "with --scheduling-policy priority, where they make way for live requests, all)",
    )
    for item in fields(BatchSettings):
        if "help" in item.metadata:
            kind = float if item.name == "upload_timeout" else int
            flag = f"--{item.name.replace('_', '-')}"
            group.add_argument(flag, type=kind, default=item.default, help=f"{item.metadata['help']} (%(default)s)")


def batch_settings(args: argparse.Namespace, models: Sequence[argparse.Namespace]) -> BatchSettings:
    """The flags as settings; ``models`` are those of each. Raises ConfigError naming the flag."""
    concurrency = args.batch_concurrency
    if concurrency is None:
        concurrency = sum(max(1, m.max_num_seqs // (1 if m.scheduling_policy == "priority" else 4)) for m in models)
    values = {item.name: getattr(args, item.name) for item in fields(BatchSettings) if "help" in item.metadata}
    return BatchSettings(data_dir=args.data_dir, concurrency=concurrency, **values)
