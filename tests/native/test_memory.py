"""Memory of weights and KV pages: taken when first touched, in huge pages, from the nodes that were named; tables held once."""

from __future__ import annotations

import ctypes
import mmap
import re
import time
from pathlib import Path

import pytest
import torch

from quire.hardware import KVGroupSpec, KVSpec, MemoryInfo, reference
from quire_cpu import native
from quire_cpu.native_attention import allocate_kv, page_bytes
from quire_cpu.placement import Placement, huge_pages

HUGE = 2 << 20
mapped = pytest.mark.skipif(
    native._native.sanitized() or not Path("/proc/self/smaps").exists(),
    reason="what is resident is read from /proc, and a sanitized build takes its memory from malloc",
)


def mapping(address: int, field: str) -> int:
    """Bytes of ``field`` of the mapping that holds ``address``."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no mapping holds {address:x}")


def resident(address: int, size: int) -> int:
    """Bytes of memory that are there (man 2 mincore): a mapping may have been joined with its neighbour's."""
    pages = size // mmap.PAGESIZE
    there = (ctypes.c_ubyte * pages)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), there) == 0
    return sum(page & 1 for page in there) * mmap.PAGESIZE


@mapped
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_kv_pages_take_memory_when_they_are_first_written(kind):
    spec = KVSpec((KVGroupSpec((0, 1), 4, 64, kind, 16),))
    pages = (256 << 20) // page_bytes(spec.groups[0])
    kv = allocate_kv(spec, (pages,))
    address = kv.buffers[0].address
    assert mapping(address, "Size") >= 255 << 20
    size = len(kv.pool(0)) * kv.layouts[0].extent_bytes
    assert resident(address, size) == 0, "nothing was written yet"
    pool = kv.pool(0)
    pool[len(pool) // 2, 3, 5].fill_(1)
    assert 0 < resident(address, size) <= 2 * HUGE
    assert not pool[len(pool) // 2, 2, 5].any(), "what was not written is zero"


@mapped
def test_the_first_tokens_take_memory_for_a_few_pages_of_all_layers_not_for_a_part_of_each_layers():
    group = KVGroupSpec(tuple(range(32)), 8, 128, "bfloat16", 16)  # as a model of 8B parameters has them
    kv = allocate_kv(KVSpec((group,)), ((8 << 30) // page_bytes(group),))
    kv.pool(0)[0].fill_(1)
    assert resident(kv.buffers[0].address, 1 << 30) == 16 * page_bytes(group) == 32 << 20


@mapped
@pytest.mark.skipif(huge_pages() in ("", "never"), reason="this system gives no huge pages")
def test_large_buffers_lie_in_huge_pages():
    buffer = native._native.Buffer(64 << 20)
    assert buffer.address % HUGE == 0
    native.as_tensor(buffer, torch.uint8).fill_(1)
    assert mapping(buffer.address, "AnonHugePages") >= 32 << 20, "half at least, also on a machine short of them"


@mapped
@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="no memory nodes are known here")
def test_buffers_take_their_memory_from_the_named_nodes():
    """One node is enough to see that the request arrives; that pages then come from it is the system's business."""

    def policy(buffer) -> str:
        for line in Path("/proc/self/numa_maps").read_text().splitlines():
            if line.startswith(f"{buffer.address:08x} "):
                return line.split()[1]
        return "default"  # part of a larger mapping that has no policy of its own

    try:
        native._native.set_nodes([0])
        assert policy(native._native.Buffer(8 << 20, True)) == "interleave:0"
        assert policy(native._native.Buffer(64 << 20)) == "interleave:0"
        native._native.set_nodes([0, 1])
        assert policy(native._native.Buffer(64 << 20)) == "default", "each thread touches its part of a weight first"
    finally:
        native._native.set_nodes([])
    assert policy(native._native.Buffer(8 << 20, True)) == "default"


@mapped
def test_memory_is_made_ready_ahead_of_the_buffers_but_not_too_far():
    def soon(address: int, expected: int) -> bool:
        return any(resident(address, 64 << 20) >= expected or time.sleep(0.01) for _ in range(2000))

    begin = native._native.begin_buffers
    try:
        begin(64 << 20, 16 << 20)
        first = native._native.Buffer(32 << 20)  # nothing of it is written
        assert soon(first.address, 16 << 20)
        time.sleep(0.05)
        assert resident(first.address, 64 << 20) <= (16 << 20) + HUGE, "no further ahead than it may be"
        second = native._native.Buffer(1 << 20)
        assert second.address == first.address + (32 << 20)
        assert soon(first.address, 48 << 20)
        values = native.as_tensor(second, torch.uint8)
        assert not values.any()
        values.fill_(7)
        begin(0, 0)
        assert values.eq(7).all(), "what a buffer has stays"
        assert resident(first.address, 64 << 20) <= (34 << 20) + HUGE, "what none has goes back"
        outside = native._native.Buffer(1 << 20)
        assert not first.address <= outside.address < first.address + (64 << 20)
    finally:
        begin(0, 0)


def test_buffers_may_be_written_while_their_memory_is_made_ready():
    begin = native._native.begin_buffers
    try:
        begin(64 << 20, 64 << 20)
        buffers = [native._native.Buffer(1 << 20) for _ in range(80)]  # more than is made ready
        for i, buffer in enumerate(buffers):
            native.as_tensor(buffer, torch.uint8).fill_(i)
        begin(0, 0)
        assert all(native.as_tensor(buffer, torch.uint8).eq(i).all() for i, buffer in enumerate(buffers))
    finally:
        begin(0, 0)


def test_a_plugin_begins_with_no_more_than_half_of_what_is_free(monkeypatch):
    import quire_cpu

    asked = []
    monkeypatch.setattr(native._native, "begin_buffers", lambda *args: asked.append(args))
    monkeypatch.setattr("quire_cpu.memory.memory", lambda: MemoryInfo(1000, 9000))
    monkeypatch.setattr("quire_cpu.placement.place", lambda cores: Placement((), ()))
    for weights, largest in ((300, 100), (4000, 100), (50, 100), (0, 0)):
        quire_cpu.begin(weights, largest)
    assert asked == [(300, 200), (500, 400), (50, 0), (0, 0)]
    monkeypatch.setattr("quire_cpu.placement.place", lambda cores: Placement((), (0, 1)))
    quire_cpu.begin(300, 100)
    assert len(asked) == 4, "who touches a page first decides the node that it is on"


@pytest.mark.parametrize(("n", "k"), [(50, 24), (33, 37), (1, 1), (300, 129)])
def test_rows_of_a_packed_table_are_those_that_were_packed(dtype, n, k):
    table, ids = torch.randn(n, k).to(dtype), torch.randint(0, n, (70,))
    assert torch.equal(native.embed(ids, native.pack_linear(table)), table[ids])
    with pytest.raises(IndexError, match=f"token id {n} is not in a vocabulary of {n}"):
        native.embed(torch.tensor([0, n]), native.pack_linear(table))


@pytest.mark.parametrize("format", [name for name, how in reference.quantize.FORMATS.items() if not how.inputs])
def test_rows_of_a_rounded_table_are_those_of_the_definition(dtype, format):
    table, ids = torch.randn(67, 300).to(dtype), torch.arange(67).flip(0)
    table[3, 5], table[4] = float("nan"), 0
    how = reference.quantize.FORMATS[format]
    rows = native.embed(ids, native.pack_quantized(table, how.bits, how.group))
    torch.testing.assert_close(rows, reference.quantize.rounded(table, how)[ids], rtol=0, atol=0, equal_nan=True)


def test_a_format_that_has_no_kernel_is_refused_before_it_is_packed():
    with pytest.raises(ValueError, match="bits and group are 8 and 0, but can be 4 or 8 and 32, 64 or 128"):
        native.pack_quantized(torch.randn(8, 64), 8, 0)


def test_rows_of_integers_with_zero_points():
    q, zeros = torch.randint(0, 16, (40, 64), dtype=torch.uint8), torch.randint(0, 16, (40, 2), dtype=torch.uint8)
    scales = torch.rand(40, 2)
    packed = native.pack_integers(q, scales, zeros, 4, 32)
    with pytest.raises(ValueError, match="have no dtype"):
        native.embed(torch.tensor([1]), packed)
    packed.dtype = torch.float32
    expected = (q.float() - zeros.repeat_interleave(32, 1)) * scales.repeat_interleave(32, 1)
    assert torch.equal(native.embed(torch.arange(40), packed), expected)
