"""Where and with what a result was measured."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """Date, command, versions, commit and machine. Loads nothing heavy: versions are read from metadata."""
    return {
        "date": now(),
        "command": _without_secrets(sys.argv),
        "versions": versions(),
        "commit": commit(Path(__file__).parent),
        "machine": machine(),
    }


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _without_secrets(command: Sequence[str]) -> list[str]:
    """The command line with the values of --api-key and --header hidden, in both of argparse's forms."""
    shown = list(command)
    for i, word in enumerate(shown):
        flag, equals, _ = word.partition("=")
        if flag in ("--api-key", "--header"):
            if equals:
                shown[i] = f"{flag}=***"
            elif i + 1 < len(shown):
                shown[i + 1] = "***"
    return shown


def versions() -> dict[str, str]:
    """Of Python, torch, numpy and every installed part of Quire."""
    found = {"python": platform.python_version()}
    for name in ("torch", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    for distribution in distributions():
        name = distribution.metadata["Name"] or ""
        if name.lower().startswith("quire"):
            found[name] = distribution.version
    return found


def commit(folder: Path) -> str | None:
    """The checkout's commit, with ``-dirty`` when files differ from it; None outside a checkout."""
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    memory = None
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (OSError, ValueError):
        pass
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "cores_usable": usable,
        "memory_gib": round(memory, 1) if memory else None,
        "system": platform.platform(),
    }
