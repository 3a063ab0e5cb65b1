"""Where threads sit and memory lies, on machines laid out as files; this one may have a single memory node."""

from __future__ import annotations

import pytest

from quire_cpu import memory, placement
from quire_cpu.memory import numbers
from quire_cpu.placement import Placement, huge_pages, place

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """``machine({node: cpulist}, siblings, allowed=...)``: the root of a file system that describes it."""

    def make(nodes: dict[int, str], siblings: dict[str, str] | None = None, allowed=None, **files: str):
        every = {core for cores in nodes.values() for core in numbers(cores)}
        monkeypatch.setattr(placement.os, "sched_getaffinity", lambda _: set(allowed or every))
        listed = ",".join(map(str, nodes))
        tree = {"sys/devices/system/node/online": listed, "sys/devices/system/node/has_memory": listed}
        tree |= {f"sys/devices/system/node/node{node}/cpulist": cores for node, cores in nodes.items()}
        for cores, pair in (siblings or {}).items():
            for core in numbers(cores):
                tree[f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"] = pair
        for name, text in (tree | files).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        return tmp_path

    return make


def hyperthreads(cores: int) -> dict[str, str]:
    """Threads i and i + cores share a core, as on most machines."""
    return {str(i): f"{i % cores},{i % cores + cores}" for i in range(2 * cores)}


def test_one_node(machine):
    root = machine({0: "0-3"})
    assert place(4, root) == Placement((0, 1, 2, 3), ())
    assert place(2, root) == Placement((0, 1), ())
    assert place(5, root) == Placement((), ()), "more threads than cores are not bound"


def test_a_machine_that_does_not_say(tmp_path, monkeypatch):
    monkeypatch.setattr(placement.os, "sched_getaffinity", lambda _: {2, 5})
    assert place(2, tmp_path) == Placement((2, 5), ())
    assert huge_pages(tmp_path) == ""


def test_threads_that_fit_on_one_node_stay_on_it(machine):
    root = machine({0: "0-3", 1: "4-11"})
    assert place(4, root) == Placement((4, 5, 6, 7), (1,))
    assert place(8, root) == Placement(tuple(range(4, 12)), (1,))


def test_more_take_each_nodes_share_side_by_side(machine):
    assert place(12, machine({0: "0-3", 1: "4-11"})) == Placement(tuple(range(12)), (0, 1))
    assert place(6, machine({0: "0,2,4,6", 1: "1,3,5,7"})) == Placement((0, 2, 4, 1, 3, 5), (0, 1))


def test_second_hardware_threads_come_last(machine):
    root = machine({0: "0-7"}, hyperthreads(4))
    assert place(4, root).cores == (0, 1, 2, 3)
    assert place(6, root).cores == (0, 1, 2, 3, 4, 5)
    root = machine({0: "0-1,4-5", 1: "2-3,6-7"}, hyperthreads(4))
    assert place(2, root) == Placement((0, 1), (0,))
    assert place(4, root) == Placement((0, 1, 2, 3), (0, 1)), "four cores, not two with both their threads"
    assert place(8, root) == Placement((0, 1, 4, 5, 2, 3, 6, 7), (0, 1))


def test_affinity_decides_what_there_is(machine):
    root = machine({0: "0-3", 1: "4-7"}, allowed={1, 5, 6})
    assert place(2, root) == Placement((5, 6), (1,))
    assert place(3, root) == Placement((1, 5, 6), (0, 1))
    root = machine({0: "0-7"}, hyperthreads(4), allowed={4, 5})
    assert place(2, root).cores == (4, 5), "second threads whose first may not be used are cores of their own"


def test_memory_of_a_node_that_may_not_be_used_is_not_asked_for(machine):
    status = {"proc/self/status": "Name:\tx\nMems_allowed_list:\t1\n"}
    assert place(8, machine({0: "0-3", 1: "4-7"}, **status)).nodes == (1,)


def test_free_memory_is_that_of_the_nodes_that_may_be_used(machine):
    node = "Node {0} MemTotal: {1} kB\nNode {0} MemFree: {2} kB\nNode {0} Inactive(file): {3} kB\n"
    root = machine(
        {0: "0", 1: "1"},
        **{
            "proc/self/status": "Mems_allowed_list:\t1\n",
            "proc/meminfo": f"MemTotal: {16 << 20} kB\nMemAvailable: {14 << 20} kB",
            "sys/devices/system/node/node0/meminfo": node.format(0, 8 << 20, 7 << 20, 0),
            "sys/devices/system/node/node1/meminfo": node.format(1, 8 << 20, 3 << 20, 1 << 20),
        },
    )
    info = memory.memory(root)
    assert (info.free, info.total) == (4 * GIB, 8 * GIB)
    assert memory.limits(root) == ["memory of 1 of the nodes only"]
    (root / "proc/self/status").write_text("Mems_allowed_list:\t0-1\n")
    assert memory.memory(root).free == 14 * GIB
    assert memory.limits(root) == []


def test_limits_are_told(machine):
    root = machine(
        {0: "0-7"},
        **{
            "proc/self/cgroup": "0::/app",
            "proc/meminfo": f"MemTotal: {16 << 20} kB\nMemAvailable: {14 << 20} kB",
            "sys/fs/cgroup/cgroup.controllers": "cpu memory",
            "sys/fs/cgroup/app/memory.max": "max",
            "sys/fs/cgroup/app/memory.high": f"{3 * GIB}",
            "sys/fs/cgroup/app/memory.current": f"{GIB}",
            "sys/fs/cgroup/app/cpu.max": "150000 100000",
        },
    )
    assert memory.limits(root) == [
        "memory held to 3.0 GiB by /sys/fs/cgroup/app",
        "1.5 of 8 cores' time by /sys/fs/cgroup/app",
    ]
    assert memory.memory(root).free == 2 * GIB, "memory.high slows a process down: what lies above it is not free"
    assert memory.cores(root) == 1


@pytest.mark.parametrize(("text", "found"), [("0-3,8", [0, 1, 2, 3, 8]), ("", []), ("5", [5]), ("none", [])])
def test_lists_of_numbers(text, found):
    assert numbers(text + "\n") == found


@pytest.mark.parametrize(
    ("text", "found"), [("always [madvise] never", "madvise"), ("always madvise [never]", "never")]
)
def test_huge_pages(machine, text, found):
    root = machine({0: "0"}, **{"sys/kernel/mm/transparent_hugepage/enabled": text})
    assert huge_pages(root) == found
