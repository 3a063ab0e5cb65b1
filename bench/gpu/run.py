"""Everything that only a GPU can tell, part by part, each in a process of its own and within its time.

    ./bench/gpu.sh [all | kit | speed | PART ...] [--device cuda] [--out bench/results] [--seconds 585]

`kit` holds the device to the contract, `speed` measures; each fits into ten minutes, as do both (`all`, in less depth).
A part that fails, hangs or has no time left is named and ends no other. Results are JSON, brought up to date after
every part: gpu-CARD-speed.json (or with the parts' names, where they were named), gpu-CARD-kit.json and
gpu-CARD-kit-invariant.json (with the name of an --attention-backend behind). Exits 1 when anything fell short.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu.rows import COPY, MATRIX, read, verdict

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Part:
    """A command, ``python -m gpu.MODULE ARGUMENTS``, and the seconds that it may take; ``least``: without which it is not
    begun. A part of the kit writes a report, the others add rows."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    seconds: int = 60
    least: int = 10
    kit: bool = field(default=False)


EIGHT = ("--shape", "8b")
SPEED = (
    Part("ceilings", "timing", seconds=60),
    Part("attention", "attention", seconds=75),
    Part("8b", "engine", (*EIGHT, "--prefill", "--decode", "1,16,64,256"), seconds=110),
    Part("0.6b", "nano", seconds=110),
    Part("start", "start", seconds=110, least=60),
    Part("int4", "engine", (*EIGHT, "--quantization", "int4-128", "--decode", "1,16"), seconds=60),
    Part("fp8", "engine", (*EIGHT, "--quantization", "fp8", "--prefill"), seconds=60),
    Part("invariant", "engine", (*EIGHT, "--batch-invariant", "--prefill", "--decode", "64"), seconds=75),
    Part("32b", "engine", ("--shape", "32b", "--prefill", "--decode", "1,16"), seconds=75),
    Part("transformers", "nano", ("--peer", "transformers"), seconds=120),
    Part("vllm", "nano", ("--peer", "vllm"), seconds=120),
    Part("kernels", "kernels", seconds=60),
    Part("kernels-invariant", "kernels", ("--batch-invariant",), seconds=45),
    Part("attention-others", "attention", ("--others",), seconds=75),
)
KIT = (
    Part("kit", "kit", seconds=400, kit=True),
    Part("kit-invariant", "kit", ("--batch-invariant",), seconds=180, kit=True),
)
# In ten minutes for everything: what the goals are about comes first and has time even if each part takes all of its
# own; the kit and what has no goal share what is left.
GOALS = ("ceilings", "attention", "8b", "int4", "fp8", "0.6b", "invariant", "start")
REST = ("transformers", "kit", "kit-invariant")
SHORTER = {"0.6b": 80, "8b": 90, "start": 80, "kit": 120, "kit-invariant": 45}


def chosen(names: Sequence[str]) -> list[Part]:
    """The parts of `all`, `kit`, `speed` or of their own names. Raises SystemExit for another name."""
    known = {part.name: part for part in (*SPEED, *KIT)}
    if not names or list(names) == ["all"]:
        first = [known[name] for name in (*GOALS, *REST)]
        rest = [part for part in SPEED if part not in first]
        return [
            Part(p.name, p.module, p.arguments, SHORTER.get(p.name, p.seconds), p.least, p.kit) for p in first + rest
        ]
    found: list[Part] = []
    for name in names:
        if name not in ("kit", "speed", *known):
            raise SystemExit(f"no part is called {name}: there are all, kit, speed, {', '.join(known)}")
        found += KIT if name == "kit" else SPEED if name == "speed" else [known[name]]
    if not all(part.kit for part in found):
        found.insert(0, known["ceilings"])
    return list(dict.fromkeys(found))


class Run:
    """The parts, one after another, and the files that keep what came of them."""

    def __init__(self, args: argparse.Namespace, parts: Sequence[Part]) -> None:
        self.args = args
        measuring = [part.name for part in parts if not part.kit]
        self.name = "speed" if len(measuring) == len(SPEED) else "-".join(measuring)
        self.rows, self.outcomes = args.scratch / "rows.jsonl", []
        self.end = time.monotonic() + args.seconds
        self.machine = machine(args.device, args.commit)
        self.card = re.sub(r"[^a-z0-9]+", "-", str(self.machine.get("card") or args.device).lower()).strip("-")

    def file(self, name: str) -> Path:
        return Path(self.args.out) / f"gpu-{self.card}-{name}.json"

    def report(self, part: Part) -> Path:
        """Where a part of the kit writes."""
        forced = self.args.attention_backend
        return self.file(part.name if forced is None else f"{part.name}-{forced.lower()}")

    def command(self, part: Part) -> list[str]:
        """Arguments behind the module's name."""
        common = ["--device", self.args.device]
        if part.kit:
            common += ["--commit", self.args.commit] if self.args.commit else []
            # In a smoke run a few cases are enough to see that the kit runs.
            few = ["-k", "gated_act", "--workers", "1"] if self.args.smoke else []
            forced = ["--attention-backend", self.args.attention_backend] if self.args.attention_backend else []
            return [*common, *part.arguments, *forced, "--json", str(self.report(part)), *few]
        more = ["--smoke"] if self.args.smoke else []
        return [*common, *part.arguments, "--rows", str(self.rows), "--scratch", str(self.args.scratch), *more]

    def play(self, part: Part) -> None:
        left = self.end - time.monotonic()
        limit = int(min(part.seconds, left))
        if left < part.least:
            self.note(part, f"not begun: {max(left, 0):.0f} s were left", 0.0)
            return
        print(f"== {part.name} (at most {limit} s)", flush=True)
        arguments = self.command(part) + (["--seconds", str(max(1, limit - 10))] if part.kit else [])
        begin = time.monotonic()
        outcome = here(part, arguments) if self.args.in_process else apart(part, arguments, limit)
        self.note(part, outcome, time.monotonic() - begin)

    def note(self, part: Part, outcome: str, seconds: float) -> None:
        self.outcomes.append({"part": part.name, "outcome": outcome, "seconds": round(seconds, 1)})
        if outcome != "ran":
            print(f"-- {part.name}: {outcome}", flush=True)
        if not part.kit:
            self.write()

    def write(self) -> None:
        """The results so far, whole at any time."""
        rows = read(self.rows)
        judged, _ = verdict(rows)
        ceilings = {row.name: row.value for row in rows if row.name in (COPY, MATRIX)}
        content = {
            "schema": 2, **self.machine, "smoke": self.args.smoke, "ceilings": ceilings, "goals": judged,
            "rows": [row.as_dict() for row in rows], "parts": self.outcomes,
        }  # fmt: skip
        target = self.file(self.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_suffix(".part").write_text(json.dumps(content, indent=1) + "\n")
        target.with_suffix(".part").replace(target)


def apart(part: Part, arguments: Sequence[str], limit: float) -> str:
    """Run a part in a process of its own; what came of it."""
    code = status([sys.executable, "-m", f"gpu.{part.module}", *arguments], limit)
    return f"ended after {limit:.0f} s, unfinished" if code is None else outcome(part, code)


def status(command: Sequence[str], limit: float) -> int | None:
    """A command's exit status; None where its time was over. It and all that it started are then ended."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def here(part: Part, arguments: Sequence[str]) -> str:
    """Run a part in this process, without a limit: for a test."""
    try:
        return outcome(part, importlib.import_module(f"gpu.{part.module}").main(list(arguments)))
    except Exception as error:
        traceback.print_exc()
        return f"failed: {type(error).__name__}: {error}"


def outcome(part: Part, code: int) -> str:
    if code == 0:
        return "ran"
    return "fell short: see the cases above" if part.kit and code == 1 else f"failed with status {code}"


def machine(device: str, commit: str | None) -> dict[str, Any]:
    """Card, driver, versions, commit and date."""
    from quire.bench.environment import describe

    found: dict[str, Any] = {**describe(), "device": device, "card": None, "problem": None}
    found["commit"] = commit or found["commit"]
    try:
        import torch

        from quire import plugins

        found["versions"]["torch"] = torch.__version__
        card = plugins.load().backend(device).devices()[0]
        found |= {"card": card.name, "card_details": card.details}
    except Exception as error:  # said once, here; each part says it again in its own words
        found["problem"] = f"{type(error).__name__}: {error}"
    with contextlib.suppress(ImportError):
        import triton

        found["versions"]["triton"] = triton.__version__
    found["driver"] = driver()
    return found


def driver() -> str | None:
    """The GPU driver's version, as the kernel tells it."""
    for file in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version", "/sys/module/xe/version"):
        try:
            text = Path(file).read_text().strip().splitlines()[0]
        except (OSError, IndexError):
            continue
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
        return found[0] if found else text
    return None


def register(folder: Path, device: str) -> None:
    """Write metadata that registers the checkout's plugin where it is not installed, so that ``--device`` and every
    command find it."""
    target = folder / "quire_checkout-0.0.0.dist-info"
    target.mkdir(parents=True, exist_ok=True)
    (target / "METADATA").write_text("Metadata-Version: 2.1\nName: quire-checkout\nVersion: 0.0.0\n")
    (target / "entry_points.txt").write_text(f"[quire]\n{device} = quire_{device.partition('-')[0]}\n")


def prepare(args: argparse.Namespace) -> None:
    """The search path of this process and of the parts."""
    from importlib.metadata import entry_points

    args.scratch.mkdir(parents=True, exist_ok=True)
    if args.device not in {point.name for point in entry_points(group="quire")}:
        register(args.scratch / "plugins", args.device)
        paths = [str(args.scratch / "plugins"), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        sys.path.insert(0, paths[0])
        importlib.invalidate_caches()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="all (the default), kit, speed, or parts by name")
    parser.add_argument("--device", default="cuda", help="cuda (the default), rocm or xpu")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results", help="folder of the results")
    parser.add_argument("--seconds", type=float, default=585.0, help="for everything (default: 585)")
    parser.add_argument("--scratch", type=Path, help="folder for 17 GB of checkpoint (default: the temporary one)")
    parser.add_argument("--commit", help="of this checkout, where git or its folder is not there to be asked")
    parser.add_argument("--attention-backend", metavar="NAME", help="hold this implementation of attention to the kit")
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)  # tiny shapes on any device
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    parts = chosen(args.parts)
    if args.attention_backend and not all(part.kit for part in parts):
        parser.error("--attention-backend is for the parts of the kit; attention-others measures")
    with tempfile.TemporaryDirectory(prefix="quire-gpu-", dir=args.scratch) as scratch:
        args.scratch = Path(scratch)
        args.out.mkdir(parents=True, exist_ok=True)
        prepare(args)
        run = Run(args, parts)
        print(json.dumps(run.machine, indent=1), flush=True)
        for part in parts:
            run.play(part)
        return summary(run, parts)


def summary(run: Run, parts: Sequence[Part]) -> int:
    """Print what was held, what fell short and what did not run; the exit status."""
    short = [o for o in run.outcomes if o["outcome"] != "ran"]
    if not all(part.kit for part in parts):
        judged, lines = verdict(read(run.rows))
        print("\n== the goals", *lines, sep="\n")
        short += [goal for goal in judged if goal["short"]]
    print("\n== the parts")
    for found in run.outcomes:
        print(f"{found['part']:20} {found['seconds']:7.1f} s  {found['outcome']}")
    files = sorted(str(file) for file in Path(run.args.out).glob(f"gpu-{run.card}-*.json"))
    print(f"\n{'something fell short' if short else 'everything held'}; results: {', '.join(files)}")
    return int(bool(short))


if __name__ == "__main__":
    raise SystemExit(main())
