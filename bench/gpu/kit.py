"""The conformance kit on a plugin, stopped in time, with a report that says on which hardware, when and of which commit.

Most of its time a GPU waits for kernels to be compiled, so the kit's modules run beside each other, in processes of their
own, as far as there are cores.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

LONGEST = ("attention", "company", "operations", "sampling")
"""Modules that take most of the time: begun first."""


def modules() -> list[str]:
    """Areas of the kit, those that take longest first; without what only measures."""
    from quire.conformance.kit import FOLDER

    found = {file.stem.removeprefix("test_") for file in FOLDER.glob("test_*.py")} - {"speed"}
    return sorted(found, key=lambda name: (LONGEST.index(name) if name in LONGEST else len(LONGEST), name))


def stop(number: int, frame: FrameType | None) -> None:
    import pytest

    pytest.exit("the time is up", returncode=4)


def options(args: argparse.Namespace) -> Any:
    """How the device is to be opened."""
    from quire.hardware import DeviceOptions

    return DeviceOptions(batch_invariant=args.batch_invariant, attention_backend=args.attention_backend)


def ask(args: argparse.Namespace, areas: list[str]) -> dict[str, Any]:
    """The report of these areas, asked in this process."""
    from quire.conformance.kit import Target, run
    from quire.plugins import load

    registry = load()
    owner = registry.owner("backends", args.device)
    target = Target(
        args.device,
        lambda: registry.backend(args.device),
        options=options(args),
        distribution=owner.distribution,
        version=owner.version,
        rank_arguments=["--device", args.device],
    )
    if args.seconds:
        signal.signal(signal.SIGALRM, stop)
        signal.alarm(args.seconds)
    report = run(target, keyword=args.keyword, modules=areas)
    signal.alarm(0)
    # pytest's statuses: all passed, some failed, and none selected are whole runs.
    return {**report.as_dict(), "complete": report.exit_code in (0, 1, 5)}


def beside(args: argparse.Namespace, areas: list[str], workers: int) -> dict[str, Any]:
    """The report of these areas, each asked in a process of its own. What a process that died had found is lost."""
    deadline = time.monotonic() + (args.seconds or 86400)

    def one(area: str, file: Path) -> dict[str, Any] | None:
        left = int(deadline - time.monotonic())
        command = [sys.executable, "-m", "gpu.kit", "--device", args.device, "--area", area, "--json", str(file)]
        command += ["--seconds", str(max(1, left))] if args.seconds else []
        command += ["-k", args.keyword] if args.keyword else []
        command += ["--batch-invariant"] if args.batch_invariant else []
        command += ["--attention-backend", args.attention_backend] if args.attention_backend else []
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(1, left) + 8)
            if not file.exists():
                print(f"{area}: ended with status {done.returncode}: {done.stderr.strip()[-800:]}", flush=True)
        except subprocess.TimeoutExpired:
            print(f"{area}: ended, it did not answer", flush=True)
        return json.loads(file.read_text()) if file.exists() else None

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(lambda area: one(area, Path(folder) / f"{area}.json"), areas))
    return merged([report for report in found if report is not None], all(found))


def merged(reports: list[dict[str, Any]], complete: bool = True) -> dict[str, Any]:
    """One report of several of the same device."""
    if not reports:
        return {"cases": [], "summary": {}, "complete": False}
    cases = [case for report in reports for case in report["cases"]]
    summary = {kind: sum(case["outcome"] == kind for case in cases) for kind in ("passed", "failed", "skipped")}
    whole = complete and all(report.get("complete", True) for report in reports)
    return {**reports[0], "cases": cases, "summary": summary, "complete": whole}


def main(argv: list[str] | None = None) -> int:
    """0: all passed; 1: some failed; 2: no device; 4: not all of it ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="a device that a plugin registers (default: cuda)")
    parser.add_argument("-k", dest="keyword", help="only cases whose names match, as pytest's -k")
    parser.add_argument("--area", action="append", default=[], help="only this module of the kit, in this process")
    parser.add_argument("--batch-invariant", action="store_true", help="open it so, and ask only whether it is true")
    parser.add_argument("--attention-backend", metavar="NAME", help="hold this implementation of attention to it")
    parser.add_argument("--workers", type=int, default=min(6, (os.cpu_count() or 1) // 2), help="processes at once")
    parser.add_argument("--seconds", type=int, default=0, help="stop after so long, and report what ran (0: never)")
    parser.add_argument("--commit", help="of this checkout, where git cannot be asked")
    parser.add_argument("--json", type=Path, help="write the report there")
    args = parser.parse_args(argv)

    from quire.hardware import UserError
    from quire.plugins import load

    try:
        backend = load().backend(args.device)
        backend.devices()
        if args.batch_invariant or args.attention_backend:
            backend.open(0, options(args))  # what cannot be honoured is said here, once
    except UserError as error:
        print(error)
        return 2
    areas = args.area or (["company"] if args.batch_invariant else modules())
    apart = not args.area and len(areas) > 1 and args.workers > 1
    result = beside(args, areas, args.workers) if apart else ask(args, areas)
    result["commit"] = args.commit or result.get("commit")
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    failed = [case for case in result["cases"] if case["outcome"] == "failed"]
    for case in failed if not args.area else ():
        print(f"FELL SHORT: {case['area']} {case['name']}: {case['message'].partition(chr(10))[0]}")
    said = ", ".join(f"{count} {kind}" for kind, count in result["summary"].items())
    print(f"{said}{'' if result['complete'] else '; not all of it ran'}")
    return 1 if failed else 0 if result["complete"] else 4


if __name__ == "__main__":
    raise SystemExit(main())
