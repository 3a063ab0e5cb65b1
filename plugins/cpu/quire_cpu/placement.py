"""Where threads sit and where memory lies on a machine with several memory nodes (NUMA) or two threads a core.

Every function takes the root of the file system, so that tests can lay out a machine of their own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quire_cpu.memory import ROOT, numbers, status_numbers


@dataclass(frozen=True)
class Placement:
    """``cores``: one for each thread, in its order; empty: none is bound. ``nodes``: the memory nodes of those cores that
    this process may take memory from; empty on a machine that has one."""

    cores: tuple[int, ...]
    nodes: tuple[int, ...]


def place(threads: int, root: Path = ROOT) -> Placement:
    """Cores for ``threads`` threads: on one node if it has as many, else on each node its share, side by side.

    On one node no access crosses to another's memory. On several, threads that follow each other share a node, since
    they take neighbouring parts of a weight, and the part that a thread packs is the part that it will read. A core's
    second hardware thread is taken when each core has one thread. More threads than processors are not bound.
    """
    nodes = _nodes(root)
    if not 0 < threads <= sum(map(len, nodes.values())):
        return Placement((), _memory_nodes(nodes, root))
    physical = {node: sum(not second for second, _ in cores) for node, cores in nodes.items()}
    roomy = [node for node, count in physical.items() if count >= threads]
    if roomy:
        node = max(roomy, key=lambda each: physical[each])  # the first of several
        chosen = {node: [core for _, core in nodes[node]][:threads]}
    else:
        chosen = _shares(threads, nodes)
    return Placement(
        tuple(core for cores in chosen.values() for core in cores), _memory_nodes(chosen, root, len(nodes))
    )


def _shares(threads: int, nodes: Mapping[int, list[tuple[bool, int]]]) -> dict[int, list[int]]:
    """The first ``threads`` processors, second hardware threads last, in order of their nodes."""
    order = sorted((second, i, node, core) for node, cores in nodes.items() for i, (second, core) in enumerate(cores))
    chosen: dict[int, list[int]] = {}
    for node in nodes:
        cores = [core for _, _, owner, core in order[:threads] if owner == node]
        if cores:
            chosen[node] = cores
    return chosen


def _nodes(root: Path) -> dict[int, list[tuple[bool, int]]]:
    """By node, (whether it is a core's second hardware thread, processor) of what this process may run on, in order."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    found: dict[int, list[tuple[bool, int]]] = {}
    folder = root / "sys/devices/system/node"
    for node in numbers(_text(folder / "online")):
        cores = sorted(allowed & set(numbers(_text(folder / f"node{node}/cpulist"))))
        if cores:
            found[node] = _ordered(cores, root)
    known = {core for cores in found.values() for _, core in cores}
    if allowed - known:  # the system does not say
        return {0: _ordered(sorted(allowed), root)}
    return found


def _ordered(cores: list[int], root: Path) -> list[tuple[bool, int]]:
    marked = []
    for core in cores:
        siblings = numbers(_text(root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"))
        marked.append((any(other < core for other in siblings if other in cores), core))
    return sorted(marked)


def _memory_nodes(nodes: Mapping[int, object], root: Path, machine: int = 0) -> tuple[int, ...]:
    if max(machine, len(nodes)) < 2:
        return ()
    allowed = status_numbers(root, "Mems_allowed_list")
    return tuple(sorted(node for node in nodes if node in allowed or not allowed))


def huge_pages(root: Path = ROOT) -> str:
    """Whether the system gives huge pages to who asks: ``always``, ``madvise`` or ``never``; empty: it does not say."""
    text = _text(root / "sys/kernel/mm/transparent_hugepage/enabled")
    return text.partition("[")[2].partition("]")[0]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
