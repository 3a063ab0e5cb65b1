"""``quire conformance``: hold a device to the contract."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "hold a device to the contract"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", required=True, metavar="NAME", help="a device that a plugin registers")
    parser.add_argument("--device-index", type=int, default=0, metavar="N", help="which of them (default: 0)")
    parser.add_argument("--threads", type=int, metavar="N", help="host threads, where the device uses them")
    parser.add_argument(
        "--isa", metavar="NAME", help="instruction set, where the device has several (default: the best)"
    )
    parser.add_argument("--batch-invariant", action="store_true", help="open the device in its batch-invariant mode")
    parser.add_argument("--attention-backend", metavar="NAME", help="hold this implementation of attention to it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("-k", dest="keyword", metavar="EXPRESSION", help="only cases whose names match, as pytest's -k")
    parser.add_argument("--speed", action="store_true", help="also measure")


def run(args: argparse.Namespace) -> int:
    try:
        import pytest  # noqa: F401
    except ImportError:
        from quire.hardware import UserError

        raise UserError("the kit needs pytest: pip install 'quire-core[conformance]'") from None
    from quire import plugins
    from quire.conformance.kit import Target
    from quire.conformance.kit import run as run_kit
    from quire.hardware import DeviceOptions

    registry = plugins.load(args.plugins)
    registry.backend(args.device)  # an unknown or unusable device is said in one line, before pytest starts
    owner = registry.owner("backends", args.device)
    arguments = ["--device", args.device]
    if args.plugins is not None:
        arguments += ["--plugins", ",".join(args.plugins)]
    target = Target(
        name=args.device,
        factory=lambda: registry.backend(args.device),
        index=args.device_index,
        options=DeviceOptions(
            threads=args.threads,
            isa=args.isa,
            batch_invariant=args.batch_invariant,
            attention_backend=args.attention_backend,
        ),
        plugin=owner.name,
        distribution=owner.distribution,
        version=owner.version,
        rank_arguments=arguments,
    )
    report = run_kit(target, keyword=args.keyword, speed=args.speed)
    if args.json is not None:
        args.json.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    if report.speed:
        _print_speed(report.speed)
    return report.exit_code


def _print_speed(rows: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("measured", "dtype", "ms", "GFLOP/s", "GB/s", title="speed")
    for row in rows:
        numbers = (row["milliseconds"], row["gflops"] or "", row["gigabytes_per_second"] or "")
        table.add_row(row["name"], row["dtype"], *map(str, numbers))
    Console().print(table)
