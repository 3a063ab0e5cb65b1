"""The GPU plugins' host code against a fake of torch's device module: order, pinned copies, recordings, memory."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

import quire_triton
from quire.engine.batch import RowTables
from quire.engine.graphs import DecodeGraphs, bucket_sizes
from quire.hardware import DeviceOptions
from quire.spec import KVGroupSpec, KVSpec
from quire_triton import architectures
from tests.triton.conftest import needs_triton
from tests.triton.fake_gpu import GIB, Gpu, in_host_memory, install

NAMES = ("cuda", "rocm", "xpu")
SPEC = KVSpec((KVGroupSpec((0,), 2, 32, "float32", 16),))


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def gpu(name, monkeypatch):
    return install(name, monkeypatch)


@pytest.fixture
def backend(name, gpu):
    one = in_host_memory(name)
    one.open(0)
    gpu.log.clear()
    return one


def test_the_fake_has_no_name_that_torch_has_not():
    """Where torch.xpu lacks one, the XPU plugin does not call it: it records nothing."""
    own = {"take", "log", "init"}
    public = {n for n in dir(Gpu) if not n.startswith("_")} - own
    assert {n for n in public if not hasattr(torch.cuda, n)} == set()
    assert {n for n in public if not hasattr(torch.xpu, n)} <= {"CUDAGraph", "graph", "graph_pool_handle"}
    assert hasattr(torch.cuda, "init")
    assert hasattr(torch.xpu, "init")


# -- order -------------------------------------------------------------------------------------------------------------
def test_work_under_a_stream_is_marked_by_an_event_of_that_stream(backend, gpu):
    with backend.stream():
        event = backend.event()
    event.synchronize()
    after = backend.event()
    after.synchronize()
    assert gpu.log == [
        "on stream 1", "event on stream 1", "host waits for an event on stream 1",
        "event on default", "host waits for an event on default",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", ["bool", "int32", "int64", "float32", "float64"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 5)])
def test_a_copy_to_the_device_is_made_in_pinned_memory_once(backend, gpu, dtype, shape):
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    array.flags.writeable = False
    there = backend.to_device(array)
    assert backend.pinned == [shape]
    np.testing.assert_array_equal(there.numpy(), array)
    assert there.numpy().dtype == array.dtype
    assert gpu.log == []  # nobody waited


LAYERS = KVSpec((KVGroupSpec((0, 2), 2, 32, "float32", 16), KVGroupSpec((1,), 2, 32, "bfloat16", 16)))


def test_pools_of_eight_bits_cross_as_bytes_with_their_scales(backend):
    """A cache whose numbers have scales beside them: both cross, and no dtype is one that torch cannot index."""
    import types

    def cache(pinned: bool):
        shape, scales = (1, 2, 6, 16, 2, 32), (1, 2, 6, 2, 16)
        make = backend._pinned if pinned else (lambda s, d: torch.empty(s, dtype=d))
        pool, scale = make(shape, torch.uint8), make(scales, torch.float32)
        pool.random_(0, 120)
        scale.normal_()
        return types.SimpleNamespace(pools=[pool.view(torch.float8_e4m3fn)], scales=[scale])

    here, there = cache(False), cache(True)
    backend.copy_pages(here, there, 0, [(1, 4), (5, 0)])
    for a, b in ((1, 4), (5, 0)):
        assert torch.equal(
            there.pools[0].view(torch.uint8)[:, :, b].as_subclass(torch.Tensor),
            here.pools[0].view(torch.uint8)[:, :, a],
        )
        assert torch.equal(there.scales[0][:, :, b].as_subclass(torch.Tensor), here.scales[0][:, :, a])


def test_swapped_pages_are_pinned_and_cross_whole(backend, gpu):
    """Out and back, through the reference's own pools; each page is one piece of pinned memory, and nobody waits."""
    kv = backend.allocate_kv(LAYERS, [200, 5])
    assert backend.pinned == []
    host = backend.allocate_kv(LAYERS, [160, 4], host=True)
    assert backend.pinned == [(160, 2, 2, 16, 2, 32), (4, 1, 2, 16, 2, 32)]
    for pool, there in zip(kv.pools, host.pools, strict=True):
        pool.normal_()
        assert there.shape == (*pool.shape[:2], there.shape[2], *pool.shape[3:])
        assert there[:, :, 1].is_contiguous()
        there.fill_(torch.nan)
    gpu.log.clear()
    shuffled = np.random.default_rng(0)
    for group, (pages, places) in enumerate(((200, 160), (5, 4))):
        pairs = list(
            zip(shuffled.permutation(pages)[:places].tolist(), shuffled.permutation(places).tolist(), strict=True)
        )
        before = kv.pools[group].clone()
        backend.copy_pages(kv, host, group, pairs)
        for a, b in pairs:
            assert torch.equal(host.pools[group][:, :, b].as_subclass(torch.Tensor), before[:, :, a])
        kv.pools[group].fill_(0)
        backend.copy_pages(host, kv, group, [(b, a) for a, b in pairs])
        taken = [a for a, _ in pairs]
        assert torch.equal(kv.pools[group][:, :, taken], before[:, :, taken])
        left = [page for page in range(pages) if page not in taken]
        assert not kv.pools[group][:, :, left].any()
    assert gpu.log == []
    assert max(shape[0] for shape in backend.pinned if len(shape) == 1) <= 64, "a limited number at once"


# -- recordings --------------------------------------------------------------------------------------------------------
class Model:
    """Its logits are the token ids; it counts how often it ran."""

    def __init__(self) -> None:
        self.ran: list[tuple[int, object]] = []

    def forward(self, token_ids, batch, kv, plan):
        assert batch.max_context_len == 64, "recorded for the longest context"
        self.ran.append((len(token_ids), self.gpu.capturing))
        return token_ids.float(), None

    def logits(self, hidden, rows):
        return hidden[0][rows][:, None]


@pytest.fixture
def graphs(backend, gpu):
    model = Model()
    model.gpu = gpu
    return DecodeGraphs(backend, model, None, SPEC, 8, 64)


@needs_triton
@pytest.mark.parametrize("name", ["cuda", "rocm"])
def test_buckets_are_recorded_when_they_are_met_from_one_pool(graphs, gpu, backend):
    assert bucket_sizes(8) == graphs.sizes == [1, 2, 3, 4, 6, 8]
    assert gpu.captures == []
    assert gpu.pools == 0  # start-up waits for none
    for count, recorded in ((5, [6]), (6, [6]), (1, [6, 1]), (7, [6, 1, 8]), (5, [6, 1, 8])):
        assert graphs.fits(count)
        rows, launched = np.arange(count, dtype=np.int64), []
        graphs.run(RowTables(8, 64, SPEC), rows, rows, lambda launched=launched: launched.append(True))
        assert launched == [True]
        assert list(graphs.buckets) == recorded
        assert len(gpu.captures) == len(recorded)
    assert {graph.pool for graph in gpu.captures} == {"pool 1"}
    assert gpu.pools == 1
    # Each bucket ran twice: once so that everything is compiled, once while it was recorded.
    assert [size for size, _ in graphs.model.ran] == [6, 6, 1, 1, 8, 8]
    assert [capturing is not None for _, capturing in graphs.model.ran] == [False, True] * 3
    assert gpu.log.count("replay") == 5
    assert not graphs.fits(9)


@needs_triton
@pytest.mark.parametrize("name", ["cuda", "rocm"])
def test_a_recording_is_ordered_after_what_was_queued_and_before_what_comes(graphs, gpu):
    assert graphs.fits(2)
    assert gpu.log == [
        "stream 1 waits for default", "on stream 1", "default waits for stream 1",
        "recording on stream 1 in pool 1 (thread_local)", "on stream 1",
    ]  # fmt: skip
    gpu.log.clear()
    assert graphs.fits(4)
    assert gpu.streams == 1  # the same one serves every recording
    assert gpu.current is gpu.default


@needs_triton
@pytest.mark.parametrize("name", ["cuda", "rocm"])
def test_what_cannot_be_recorded_is_said_once_and_not_tried_again(graphs, gpu, caplog):
    gpu.refusal = "operation not permitted when stream is capturing\nmore"
    with caplog.at_level(logging.WARNING):
        assert not graphs.fits(3)
        assert not graphs.fits(3)
        assert not graphs.fits(1)
    assert [r.getMessage() for r in caplog.records] == [
        "decode steps are not recorded as graphs: operation not permitted when stream is capturing"
    ]
    assert gpu.current is gpu.default


@pytest.mark.parametrize("name", ["xpu"])
def test_xpu_records_nothing(backend):
    assert not backend.capabilities.graphs
    assert backend.capture(lambda: None, []) is None


# -- memory ------------------------------------------------------------------------------------------------------------
def test_a_measured_step_counts_the_allocators_peak_and_what_libraries_took(backend, gpu):
    gpu.take(10 * GIB, GIB)  # weights, and a library's workspace from before

    def step():
        gpu.take(3 * GIB, GIB // 2)
        gpu.reserved -= GIB  # given back before the end: the peak remembers it
        gpu.take(GIB // 4)

    assert backend.peak_memory(step) == 3 * GIB + GIB // 2
    assert gpu.log == ["synchronize", "empty cache", "synchronize", "empty cache"]
    assert backend.peak_memory(lambda: None) == 0


def test_memory_that_others_gave_back_meanwhile_is_not_counted(backend, gpu):
    gpu.take(0, 5 * GIB)

    def step():
        gpu.take(GIB)
        gpu.outside -= 2 * GIB

    assert backend.peak_memory(step) == GIB


def test_an_engine_on_the_fake(tmp_path, monkeypatch):
    """From the configuration to a measured plan, pinned host pages and tokens, with the references computing."""
    from quire import plugins
    from quire.config import make_config
    from quire.engine.build import build_engine
    from tests.engine.conftest import save_random

    folder = save_random(tmp_path, "Qwen3ForCausalLM")
    monkeypatch.setattr(quire_triton, "missing", lambda *_: "no Triton in this test")
    gpu, backend = install("cuda", monkeypatch), in_host_memory("cuda")
    registry = plugins.load(["cpu"])
    registry.plugins[-1].registered["backends"].append("cuda")
    registry.backends["cuda"] = lambda: backend
    embed = backend.embed

    def embedding(ids, table):
        gpu.take(2 * GIB)  # stands for what a step takes
        return embed(ids, table)

    backend.embed = embedding
    config = make_config(
        str(folder), device="cuda", skip_tokenizer_init=True, max_num_seqs=3, max_num_batched_tokens=64, max_model_len=128,
        swap_space=0.001, dtype="float32",
    )  # fmt: skip
    engine = build_engine(config, registry)
    assert gpu.reserved == 2 * GIB, "one step was run, and it was the only one"
    assert engine.memory.working == 2 * GIB
    assert engine.device.startswith("cuda:0 (GPU 0, compute capability 9.0")
    assert "working memory 2.00 GiB (measured)" in engine.memory.report()
    assert [shape[0] for shape in backend.pinned if len(shape) == 6] == list(engine.memory.host_pages)
    engine.close()


# -- architectures -----------------------------------------------------------------------------------------------------
AMD = {
    "gfx90a": (64, None, "mfma"),
    "gfx942": (64, "float8_e4m3fnuz", "mfma"),
    "gfx950": (64, "float8_e4m3fn", "mfma"),
    "gfx1100": (32, None, "wmma"),
}


@pytest.mark.parametrize("arch", AMD)
def test_what_amds_architectures_fix(arch, monkeypatch):
    gpu = Gpu(gcnArchName=f"{arch}:sramecc+:xnack-")
    gpu.arch_list = [arch]
    install("rocm", monkeypatch, gpu)
    backend = in_host_memory("rocm")
    backend.open(0)
    row = backend.architecture
    assert (row.wave, row.fp8, row.matrix) == AMD[arch]
    kinds = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz")
    assert {kind for kind in kinds if row.multiplies(kind)} == {"bfloat16", *([row.fp8] if row.fp8 else [])}
    assert row.describe() in backend.notes()


def test_the_two_kinds_of_fp8_are_not_the_same_numbers():
    """Why they must not be mistaken: the same byte is another number, by a factor of two."""
    byte = torch.tensor([0x48], dtype=torch.uint8)
    assert byte.view(torch.float8_e4m3fn).float() == 2 * byte.view(torch.float8_e4m3fnuz).float()
    assert torch.tensor([0x80], dtype=torch.uint8).view(torch.float8_e4m3fnuz).float().isnan()


def test_an_architecture_without_a_row_promises_nothing():
    import types

    row = architectures.of("cuda", types.SimpleNamespace(gcnArchName="gfx1250", warp_size=32), hip=True)
    assert (row.name, row.wave, row.fp8) == ("gfx1250", 32, None)
    assert architectures.of("cuda", types.SimpleNamespace(major=8, minor=9)).fp8 == "float8_e4m3fn"
    assert not architectures.of("cuda", types.SimpleNamespace(major=8, minor=0)).multiplies("float8_e4m3fn")
    xpu = types.SimpleNamespace(sub_group_sizes=[16, 32], has_subgroup_matrix_multiply_accumulate=True)
    assert architectures.of("xpu", xpu).matrix == "xmx"


def test_options_that_the_device_has_not_are_refused(name, gpu):
    from quire.hardware import UnsupportedOnDevice

    with pytest.raises(
        UnsupportedOnDevice, match=f"--attention-backend FLASH_ATTN is not supported on device '{name}'"
    ):
        in_host_memory(name).open(0, DeviceOptions(attention_backend="FLASH_ATTN"))
