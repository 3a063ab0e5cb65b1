"""The CPU plugin beyond the contract: threads, control groups, and exactness whatever the library does."""

from __future__ import annotations

import pytest
import torch

from quire.conformance.world import Paper, Row, Shape, Stage
from quire.hardware import DeviceOptions, UnsupportedOnDevice
from quire_cpu import attention, linear, memory, pointwise
from quire_cpu.backend import CpuBackend


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def backend():
    cpu = CpuBackend()
    cpu.open(0, DeviceOptions(threads=1))
    return cpu


# -- products ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "inner"), [(96, 256), (64, 2432), (53, 37)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_rows_bits_do_not_depend_on_the_number_of_rows(dtype, out, inner, threads):
    """Sums that cancel: the result is the rounding, so that another order shows also in bfloat16."""
    backend = CpuBackend()
    backend.open(0, DeviceOptions(threads=threads))
    raw, x = linear.cancelling(out, inner, 600, dtype, torch.Generator().manual_seed(7))
    weight = backend.pack_weight({"weight": raw})
    whole = weight(x)
    for count in [*range(1, 71), 127, 128, 129, 513]:
        for begin in (0, 5):
            assert torch.equal(weight(x[begin : begin + count]), whole[begin : begin + count]), (count, begin)


@pytest.mark.parametrize("admitted", [frozenset(), frozenset({16}), frozenset({16, 1}), frozenset({16, 64})])
def test_what_is_admitted_changes_nothing(admitted):
    """With a library that is exact for few sizes, or for none, the answers are still right and still exact."""

    class Few(linear.Exactness):
        def admits(self, block, size, bias):
            return size in admitted

    raw, x = torch.randn(40, 64), torch.randn(130, 64)
    weight = linear.PackedWeight(raw, Few())
    whole = weight(x)
    torch.testing.assert_close(whole, x @ raw.T, rtol=1e-5, atol=1e-5)
    for begin, end in ((0, 1), (3, 4), (1, 18), (40, 104), (2, 130)):
        assert torch.equal(weight(x[begin:end].clone()), whole[begin:end])


def test_a_size_that_is_not_exact_is_not_admitted(monkeypatch):
    """A library that sums in another order for more than 32 rows is found out."""

    class Fickle(linear.Block):
        def __call__(self, x, bias):
            if len(x) <= 32:
                return super().__call__(x, bias)
            return torch.cat([torch.nn.functional.linear(row.flip(-1)[None], self.raw.flip(-1), bias) for row in x])

        def __init__(self, weight):
            super().__init__(weight)
            self.raw = weight

    monkeypatch.setattr(linear, "Block", Fickle)
    exactness, block = linear.Exactness(), Fickle(torch.randn(64, 96).bfloat16())
    assert exactness.admits(block, 16, False)
    assert exactness.admits(block, 32, False)
    assert not exactness.admits(block, 48, False)


def test_large_weights_are_cut_in_blocks(backend):
    raw = torch.randn(2 * linear.COLUMNS + 5, 16)
    weight = backend.pack_weight({"weight": raw})
    x, bias = torch.randn(3, 16), torch.randn(len(raw))
    assert [block.shape[0] for block in weight.blocks] == [linear.COLUMNS, linear.COLUMNS, 5]
    torch.testing.assert_close(weight(x, bias), x @ raw.T + bias, rtol=1e-5, atol=1e-5)
    assert weight(x[:0]).shape == (0, len(raw))


def test_a_mismatch_of_dtypes_is_refused(backend):
    weight = backend.pack_weight({"weight": torch.randn(8, 8)})
    with pytest.raises(UnsupportedOnDevice, match="bfloat16"):
        backend.linear(torch.randn(2, 8).bfloat16(), weight)


# -- attention ---------------------------------------------------------------------------------------------------------
def test_small_chunks_of_scores_change_nothing(backend, monkeypatch):
    paper = Paper([Row(200, 90), Row(70, 1), Row(333, 333), Row(150, 2)], Shape(heads=6, kv_heads=2))
    whole = Stage(backend, paper).attend()
    monkeypatch.setattr(attention, "CHUNK_BYTES", 1)
    assert torch.equal(Stage(backend, paper).attend(), whole)


def test_without_large_query_tiles_the_bits_are_the_same(backend, monkeypatch):
    paper = Paper([Row(200, 90), Row(70, 70)], Shape(heads=14, kv_heads=2))
    whole = Stage(backend, paper).attend()
    monkeypatch.setattr(CpuBackend, "_prefill_exact", lambda self, rows, dim: False)
    assert torch.equal(Stage(backend, paper).attend(), whole)


def test_more_query_heads_than_a_tile_has_rows(backend):
    from quire.conformance.world import compare

    compare(backend, [Row(20, 20), Row(3, 1)], Shape(heads=144, kv_heads=1))


# -- opening -----------------------------------------------------------------------------------------------------------
def test_threads(backend):
    backend.open(0, DeviceOptions(threads=2))
    assert torch.get_num_threads() == 2
    backend.open(0)
    assert torch.get_num_threads() == memory.cores()
    with pytest.raises(UnsupportedOnDevice, match="threads is 0"):
        backend.open(0, DeviceOptions(threads=0))
    with pytest.raises(UnsupportedOnDevice, match="not 1"):
        backend.open(1)


def test_invariance_that_cannot_be_kept_is_not_promised(monkeypatch, caplog):
    monkeypatch.setattr(pointwise, "places_agree", lambda: False)
    cpu = CpuBackend()
    cpu.open(0, DeviceOptions(threads=1))
    assert not cpu.capabilities.batch_invariant
    assert CpuBackend.capabilities.batch_invariant
    assert "depend on the load" in caplog.text
    with pytest.raises(UnsupportedOnDevice, match="--threads 1"):
        CpuBackend().open(0, DeviceOptions(batch_invariant=True))


def test_the_device_has_a_name(backend):
    (device,) = backend.devices()
    assert device.name
    assert "core" in device.details


# -- control groups ----------------------------------------------------------------------------------------------------
GIB = 1 << 30


@pytest.fixture
def machine(tmp_path):
    """A file system with 16 GiB of memory, of which 10 are available, and files as given."""

    def make(**files: str):
        files = {"proc/meminfo": f"MemTotal: {16 << 20} kB\nMemAvailable: {10 << 20} kB\n", **files}
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


V2 = {"sys/fs/cgroup/cgroup.controllers": "cpu memory", "proc/self/cgroup": "0::/app/one\n"}


def gib(info) -> tuple[float, float]:
    return info.free / GIB, info.total / GIB


def test_memory_without_limits(machine):
    assert gib(memory.memory(machine())) == (10, 16)


def test_memory_of_a_v2_group(machine):
    root = machine(
        **V2,
        **{
            "sys/fs/cgroup/app/one/memory.max": "max\n",
            "sys/fs/cgroup/app/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/app/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/app/memory.stat": f"anon {GIB}\ninactive_file {GIB}\n",
        },
    )
    assert gib(memory.memory(root)) == (2, 4), "4 GiB less the 3 used, of which 1 is inactive page cache"


def test_memory_of_a_v2_container_whose_path_is_the_hosts(machine):
    root = machine(**{**V2, "proc/self/cgroup": "0::/docker/abc\n"}, **{"sys/fs/cgroup/memory.max": f"{2 * GIB}"})
    assert gib(memory.memory(root)) == (2, 2)


def test_memory_of_a_v1_group(machine):
    root = machine(
        **{
            "proc/self/cgroup": "5:memory:/job\n3:cpu,cpuacct:/job\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{8 * GIB}",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{7 * GIB}",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        }
    )
    assert gib(memory.memory(root)) == (1, 8)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("150000 100000", 1), ("250000 100000", 2), ("50000 100000", 1), ("max 100000", 64)],
)
def test_cores_of_a_v2_quota(machine, monkeypatch, quota, cores):
    monkeypatch.setattr(memory.os, "sched_getaffinity", lambda _: set(range(64)))
    assert memory.cores(machine(**V2, **{"sys/fs/cgroup/app/one/cpu.max": quota})) == cores


def test_cores_of_a_v1_quota_and_of_affinity(machine, monkeypatch):
    root = machine(
        **{
            "proc/self/cgroup": "3:cpu,cpuacct:/job\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "400000",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
        }
    )
    monkeypatch.setattr(memory.os, "sched_getaffinity", lambda _: set(range(64)))
    assert memory.cores(root) == 4
    monkeypatch.setattr(memory.os, "sched_getaffinity", lambda _: {3, 5})
    assert memory.cores(root) == 2


def test_the_processors_instruction_sets(machine):
    text = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512f avx512_bf16 fma\n\nmodel name: other\n"
    name, sets = memory.processor(machine(**{"proc/cpuinfo": text}))
    assert name == "Some CPU @ 2 GHz"
    assert set(sets) == {"avx2", "avx512f", "avx512_bf16", "fma"}


@pytest.mark.parametrize("name", ["cpu", "cpu-torch"])
def test_it_has_one_implementation_of_attention(name):
    from quire import plugins

    registry = plugins.load(["cpu"])
    registry.backend(name).open(0, DeviceOptions(attention_backend="cpu_attn"))
    with pytest.raises(UnsupportedOnDevice, match=f"--attention-backend FLASHINFER .*'{name}': it offers CPU_ATTN"):
        registry.backend(name).open(0, DeviceOptions(attention_backend="FLASHINFER"))
