"""What this process may use of the machine: memory and cores, with control groups (v1 and v2) and affinity respected.

Every function takes the root of the file system, so that tests can lay out a machine of their own.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

from quire.hardware import MemoryInfo

ROOT = Path("/")
INSTRUCTION_SETS = (
    "amx_bf16", "amx_int8", "avx512f", "avx512_bf16", "avx512_vnni", "avx2", "fma", "f16c", "sve2", "sve",
    "bf16", "i8mm", "asimd",
)  # fmt: skip


def memory(root: Path = ROOT) -> MemoryInfo:
    """Bytes this process could still take and bytes there are: the machine's, or less if a control group says so, or if
    it may not use every memory node."""
    machine = _meminfo(root)
    free, total = machine["MemAvailable"], machine["MemTotal"]
    for folder in _groups(root, "memory"):
        limit = _memory_limit(folder)
        if limit is None or limit >= machine["MemTotal"]:
            continue
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes") or 0
        # The page cache counts as used, but its inactive part is given back under pressure.
        used -= min(used, _stat(folder / "memory.stat", "inactive_file"))
        free, total = min(free, max(0, limit - used)), min(total, limit)
    nodes = _allowed_nodes(root)
    if nodes:
        free, total = min(free, sum(node[0] for node in nodes)), min(total, sum(node[1] for node in nodes))
    return MemoryInfo(free=free, total=total, shared=True)


def cores(root: Path = ROOT) -> int:
    """How many threads make sense: the cores of this process's affinity, less if a control group's quota is less."""
    count = _affinity()
    for folder in _groups(root, "cpu"):
        quota = _quota(folder)
        if quota is not None:
            count = min(count, max(1, int(quota)))
    return count


def limits(root: Path = ROOT) -> list[str]:
    """What holds this process below the machine's memory and cores, for people: nothing, or a phrase for each limit."""
    found = []
    total, allowed = _meminfo(root)["MemTotal"], _affinity()
    for folder in _groups(root, "memory"):
        limit = _memory_limit(folder)
        if limit is not None and limit < total:
            found.append(f"memory held to {limit / 2**30:.1f} GiB by {_name(folder, root)}")
    nodes = _allowed_nodes(root)
    if nodes:
        found.append(f"memory of {len(nodes)} of the nodes only")
    for folder in _groups(root, "cpu"):
        quota = _quota(folder)
        if quota is not None and quota < allowed:
            found.append(f"{quota:g} of {allowed} cores' time by {_name(folder, root)}")
    return found


def processor(root: Path = ROOT) -> tuple[str, tuple[str, ...]]:
    """(model name, instruction sets worth knowing) of the first processor."""
    fields: dict[str, str] = {}
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    name = fields.get("model name") or platform.processor() or platform.machine() or "CPU"
    return name, tuple(s for s in INSTRUCTION_SETS if s in flags)


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_limit(folder: Path) -> int | None:
    """Bytes at which a group's processes are killed, or (v2's memory.high) slowed down until they give some back."""
    found = [_number(folder / "memory.max", folder / "memory.limit_in_bytes"), _number(folder / "memory.high")]
    return min((limit for limit in found if limit is not None), default=None)


def _allowed_nodes(root: Path) -> list[tuple[int, int]]:
    """(bytes that are free or easily freed, bytes in all) of each memory node, where not every node may be used."""
    folder = root / "sys/devices/system/node"
    allowed, online = status_numbers(root, "Mems_allowed_list"), numbers(_text(folder / "has_memory"))
    if not allowed or not set(online) - set(allowed):
        return []
    found = []
    for node in set(online) & set(allowed):
        words = (line.split() for line in _text(folder / f"node{node}/meminfo").splitlines())
        values = {line[2].rstrip(":"): int(line[3]) * 1024 for line in words if len(line) >= 4}
        easy = sum(values.get(key, 0) for key in ("MemFree", "Inactive(file)", "Active(file)", "SReclaimable"))
        found.append((easy, values.get("MemTotal", 0)))
    return found


def _name(folder: Path, root: Path) -> str:
    return "/" + str(folder.relative_to(root))


def _meminfo(root: Path) -> dict[str, int]:
    values = {}
    for line in _text(root / "proc/meminfo").splitlines():
        key, _, rest = line.partition(":")
        if rest.split():
            values[key] = int(rest.split()[0]) * 1024
    if "MemTotal" not in values:  # not Linux: what POSIX says
        page = os.sysconf("SC_PAGE_SIZE")
        values["MemTotal"] = page * os.sysconf("SC_PHYS_PAGES")
    values.setdefault("MemAvailable", values.get("MemFree", values["MemTotal"]))
    return values


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control groups that may limit ``controller``, from its own up to the root."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base = root / "sys/fs/cgroup"
            if not (base / "cgroup.controllers").exists():
                base = base / "unified"
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
            if not base.exists():
                base = root / "sys/fs/cgroup" / controllers
        else:
            continue
        # In a container the path may be the host's and not exist here: then the mount itself is our group.
        folder = base / path.lstrip("/")
        while folder != base and base in folder.parents:
            if folder.exists():
                yield folder
            folder = folder.parent
        if base.exists():
            yield base


def _quota(folder: Path) -> float | None:
    """Cores' worth of time per period, or None where there is no limit."""
    words = _text(folder / "cpu.max").split()
    if len(words) == 2 and words[0] != "max":
        return int(words[0]) / int(words[1])
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    if quota is not None and period and quota > 0:
        return quota / period
    return None


def _stat(path: Path, key: str) -> int:
    values = dict(line.split()[:2] for line in _text(path).splitlines() if len(line.split()) == 2)
    return int(values.get(f"total_{key}", values.get(key, 0)))


def _number(*paths: Path) -> int | None:
    for path in paths:
        text = _text(path).strip()
        if text.lstrip("-").isdigit():
            return int(text)
    return None


def status_numbers(root: Path, key: str) -> list[int]:
    """A list of processors or nodes in /proc/self/status; empty where it has none."""
    for line in _text(root / "proc/self/status").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return numbers(value)
    return []


def numbers(text: str) -> list[int]:
    """``0-3,8`` as [0, 1, 2, 3, 8]; what is none is left out."""
    found: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (not last or last.isdigit()):
            found.extend(range(int(first), int(last or first) + 1))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
