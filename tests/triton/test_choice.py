"""Which attention computes a step on CUDA and XPU, and that what other libraries are handed is what their releases take."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import types
from pathlib import Path

import pytest
import torch

import quire_triton
from quire.conformance.kit import Target
from quire.conformance.kit import run as run_kit
from quire.conformance.world import Float64, Paper, Stage, close
from quire.conformance.world import Row as Sequence
from quire.conformance.world import Shape as Case
from quire.hardware import CapturedStep, DeviceOptions, NormSpec, UnsupportedOnDevice
from quire.reference import ops
from quire.spec import AttentionSpec
from quire_cuda.attention import FLASHINFER, VARLEN, page_lists, parameters
from quire_cuda.attention import TABLE as CUDA_TABLE
from quire_triton.choice import TRITON, Row, Shape, order
from quire_xpu.attention import IPEX
from quire_xpu.attention import TABLE as XPU_TABLE
from tests.triton import fake_libraries, released
from tests.triton.fake_gpu import in_host_memory, install

ROOT = Path(__file__).resolve().parents[2]
RAGGED = [Sequence(9, 9), Sequence(40, 1), Sequence(300, 17), Sequence(20, 0), Sequence(16, 16), Sequence(257, 1)]
DECODE = [Sequence(1, 1), Sequence(16, 1), Sequence(17, 1), Sequence(256, 1), Sequence(513, 1)]


@pytest.fixture
def no_triton(monkeypatch):
    """The kernels here do not run in host memory: the references stand beside what is under test."""
    monkeypatch.setattr(quire_triton, "missing", lambda *_: "no Triton in this test")


@pytest.fixture
def with_triton(monkeypatch):
    monkeypatch.setattr(quire_triton, "missing", lambda *_: None)


@pytest.fixture
def cuda(monkeypatch):
    """A function that opens the CUDA backend on the fake. Without stand-ins neither library is usable."""
    install("cuda", monkeypatch)

    def opened(name: str | None = None, **options):
        backend = in_host_memory("cuda")
        backend.open(0, DeviceOptions(attention_backend=name, **options))
        return backend

    return opened


# -- the table ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("table", [CUDA_TABLE, XPU_TABLE])
def test_a_row_that_prefers_another_names_its_measurement(table):
    for row in table:
        assert row.order[0] == TRITON or (row.measured and (ROOT / "bench" / "results" / row.measured).is_file()), row
    for decode in (True, False):
        assert order(table, "an architecture without a row", decode).decode == decode


def test_an_architectures_own_row_comes_before_the_one_for_any():
    rows = (Row("*", True, ("A",)), Row("sm_90", True, ("B",)), Row("*", False, ("C",)))
    assert order(rows, "sm_90", True).order == ("B",)
    assert order(rows, "sm_80", True).order == ("A",)
    assert order(rows, "sm_90", False).order == ("C",)


def test_the_kernels_here_are_untouched_where_the_table_puts_them_first(cuda, with_triton, monkeypatch):
    """Nothing is made, planned or looked up beside them."""
    world = fake_libraries.flashinfer(monkeypatch)
    backend = cuda()
    assert backend._others == {}
    assert world.wrappers == []
    notes = backend.notes()
    assert "attention of one query a sequence: TRITON_ATTN (order: not yet timed)" in notes
    assert "attention of prompts and chunks: TRITON_ATTN (order: not yet timed)" in notes


def shape(**changes) -> Shape:
    spec = AttentionSpec(
        heads=8, kv_heads=2, head_dim=changes.pop("head_dim", 128), scale=0.1, **changes.pop("spec", {})
    )
    return Shape(**{**dict(spec=spec, decode=True, page_size=16, dtype="bfloat16", kv_dtype="bfloat16"), **changes})


def test_the_table_chooses_by_the_kind_of_step(cuda, with_triton, monkeypatch):
    fake_libraries.flashinfer(monkeypatch)
    table = (Row("sm_90", False, (FLASHINFER, TRITON), "x.json"), *CUDA_TABLE)
    monkeypatch.setattr("quire_cuda.backend.CudaBackend.attention_table", table)
    backend = cuda()
    assert backend._pick(shape(decode=False)).name == FLASHINFER
    assert backend._pick(shape(decode=True)) is None, "the kernels here"
    for refused in (dict(head_dim=80), dict(dtype="float32"), dict(sinks=True), dict(spec={"window": 64})):
        assert backend._pick(shape(decode=False, **refused)) is None
    notes = backend.notes()
    assert "attention of prompts and chunks: FLASHINFER, then TRITON_ATTN (order: x.json)" in notes
    assert "attention of one query a sequence: TRITON_ATTN (order: not yet timed)" in notes
    # Bits must not depend on the batch: then there is no choice.
    assert cuda(batch_invariant=True)._others == {}


def test_without_triton_others_are_asked_before_the_references(cuda, no_triton, monkeypatch):
    fake_libraries.flashinfer(monkeypatch)
    backend = cuda()
    assert backend._pick(shape()).name == FLASHINFER
    assert backend._pick(shape(page_size=256, head_dim=80)).name == VARLEN
    assert backend._pick(shape(head_dim=80)) is None, "the references"


# -- what a user may ask for -------------------------------------------------------------------------------------------
def test_what_is_asked_for_is_used_or_refused_by_name(cuda, no_triton, monkeypatch):
    with pytest.raises(
        UnsupportedOnDevice, match=r"FLASHINFER is not supported on device 'cuda': it is not installed: pip"
    ):
        cuda("FLASHINFER")
    with pytest.raises(UnsupportedOnDevice, match=r"TRITON_ATTN is not supported.*no Triton in this test; instead"):
        cuda("triton_attn")
    fake_libraries.flashinfer(monkeypatch)
    backend = cuda("flashinfer")
    assert "attention: FLASHINFER, as --attention-backend says" in backend.notes()
    # What it cannot take is not offered, so that the engine refuses it before anything is loaded.
    assert backend.capabilities.dtypes == {"bfloat16", "float16"}
    assert backend.capabilities.kv_dtypes == {"bfloat16", "float16"}
    assert backend.capabilities.head_sizes == (64, 256)
    assert cuda(VARLEN).capabilities.page_sizes == {256}
    for refused, why in (
        (dict(head_dim=80), "head sizes of 64, 128, 256, not 80"),
        (dict(spec={"window": 64}), "0 * NaN|window has passed"),
        (dict(sinks=True), "no attention sinks"),
        (dict(kv_dtype="int8"), "not int8 with bfloat16"),
    ):
        with pytest.raises(UnsupportedOnDevice, match=f"--attention-backend FLASHINFER is not supported.*({why})"):
            backend._pick(shape(**refused))
    with pytest.raises(UnsupportedOnDevice, match="it has no soft cap"):
        cuda(VARLEN)._pick(shape(page_size=256, spec={"soft_cap": 30.0}))


def test_one_whose_bits_depend_on_the_batch_is_refused_where_they_must_not(cuda, with_triton, monkeypatch):
    fake_libraries.flashinfer(monkeypatch)
    with pytest.raises(
        UnsupportedOnDevice, match=r"its bits depend on the batch.*instead: --attention-backend T.*TRITON_ATTN"
    ):
        cuda(FLASHINFER, batch_invariant=True)
    assert cuda(TRITON, batch_invariant=True).capabilities.batch_invariant


@pytest.mark.parametrize(
    ("version", "cache", "nvcc", "why"),
    [
        ("0.5.3", True, False, "FlashInfer 0.5.3 is installed; 0.6 or later is needed"),
        ("0.7.2", False, False, "there is no nvcc: pip install flashinfer-jit-cache"),
        ("0.7.2", False, True, None),
        ("0.6.0", True, False, None),
    ],
)
def test_flashinfer_that_cannot_be_used_says_why(version, cache, nvcc, why, cuda, no_triton, monkeypatch):
    fake_libraries.flashinfer(monkeypatch, version)
    if not cache:
        import sys

        monkeypatch.delitem(sys.modules, "flashinfer_jit_cache")
    monkeypatch.setattr("shutil.which", lambda name: "/bin/nvcc" if nvcc else None)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    backend = cuda()
    said = [note for note in backend.notes() if note.startswith("not usable: FLASHINFER: ")]
    assert (why is None and said == []) or (len(said) == 1 and said[0].endswith(why))


def test_an_old_varlen_says_what_it_lacks(cuda, no_triton, monkeypatch, tmp_path):
    """As torch 2.11 has it: no block table."""
    source = tmp_path / "varlen.py"
    source.write_text(f"def varlen_attn({released.VARLEN[2, 11].replace('=', '=None')}): ...")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: types.SimpleNamespace(origin=str(source)))
    from quire_cuda.attention import TorchVarlen

    why = TorchVarlen(None).missing()
    assert why == (
        "varlen_attn of torch 2.13.0 does not take block_table, enable_gqa, seqused_k, so it cannot read pages: torch 2.13 "
        "does"
    )
    assert parameters("x = 1", "varlen_attn") == set()


# -- what is computed --------------------------------------------------------------------------------------------------
def computed(backend, rows, sort: Case) -> None:
    """Every layer of one step, under one plan, against float64."""
    paper = Paper(rows, sort, 0)
    stage, truth = Stage(backend, paper), Stage(Float64(), paper, "float64")
    stage.store(past=False)
    plan = backend.plan_attention(stage.batch(), stage.spec)
    for layer in range(sort.layers):
        got = backend.attention(stage.on(paper.q), stage.kv, layer, plan, sort.attention())
        close(got, truth.attend(layer), sort.dtype, what=f"layer {layer}")


CASES = {
    "one head a group": dict(heads=2, kv_heads=2),
    "grouped": dict(heads=8, kv_heads=2),
    "soft cap": dict(soft_cap=20.0),
}


@pytest.mark.parametrize("rows", [RAGGED, DECODE], ids=["ragged", "decode"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("page_size", [16, 128])
def test_flashinfer_is_handed_the_step(rows, case, page_size, cuda, no_triton, monkeypatch):
    """Shuffled pages, unused ones full of NaN, no copy of the pool: the answer is float64's."""
    world = fake_libraries.flashinfer(monkeypatch)
    backend = cuda(FLASHINFER)
    sort = Case(head_dim=64, page_size=page_size, dtype="bfloat16", kv_dtype="bfloat16", layers=3, **CASES[case])
    computed(backend, rows, sort)
    assert len(world.wrappers) == world.plans == 1, "planned once for all layers"
    assert type(world.wrappers[0]).__name__.startswith("BatchDecode" if rows is DECODE else "BatchPrefill")


@pytest.mark.parametrize("rows", [RAGGED, DECODE], ids=["ragged", "decode"])
@pytest.mark.parametrize("case", ["one head a group", "grouped"])
def test_torchs_varlen_is_handed_the_step(rows, case, cuda, no_triton, monkeypatch):
    backend = cuda(VARLEN)
    calls = fake_libraries.varlen(monkeypatch)
    computed(backend, rows, Case(head_dim=80, page_size=256, dtype="float16", kv_dtype="float16", **CASES[case]))
    assert len(calls) == 1


@pytest.mark.parametrize(("name", "size"), [(FLASHINFER, 16), (VARLEN, 256)])
def test_tokens_that_belong_to_no_sequence_get_zeros(name, size, cuda, no_triton, monkeypatch):
    fake_libraries.flashinfer(monkeypatch)
    backend = cuda(name)
    fake_libraries.varlen(monkeypatch)
    sort = Case(head_dim=64, page_size=size, dtype="bfloat16", kv_dtype="bfloat16")
    stage = Stage(backend, Paper([Sequence(9, 9), Sequence(4, 1)], sort, 0))
    stage.store(past=False)
    q = torch.randn(15, sort.heads, 64).bfloat16()
    out = backend.attention(q, stage.kv, 0, backend.plan_attention(stage.batch(), sort.kv()), sort.attention())
    assert out.shape == q.shape
    assert out[:10].isfinite().all()
    assert not out[10:].any()


@pytest.mark.parametrize(("name", "pages"), [(FLASHINFER, {16}), (VARLEN, {256})])
def test_a_recorded_step_is_planned_again_and_its_memory_stays(name, pages, cuda, no_triton, monkeypatch):
    """The conformance kit's cases of captured steps: other lengths, other pages, padding rows. A replay is made to run the
    function again, which the fake device does not."""
    world = types.SimpleNamespace(recording=False) if name == VARLEN else fake_libraries.flashinfer(monkeypatch)
    calls = []

    def factory():
        backend = cuda()  # layers with a window go to the references
        calls.append(fake_libraries.varlen(monkeypatch))
        backend.open = lambda *a: None
        only = frozenset({"bfloat16"})
        backend.capabilities = dataclasses.replace(
            backend.capabilities,
            graphs=True,
            page_sizes=frozenset(pages),
            dtypes=only,
            kv_dtypes=only,
            head_sizes=(64, 256),
        )

        def record(fn):
            fn()

            class Again(CapturedStep):
                def replay(self):
                    world.recording = True  # plan() here would be an error
                    try:
                        return fn()
                    finally:
                        world.recording = False

            step = Again()
            step.replay()
            return step

        backend._recorder = types.SimpleNamespace(record=record)
        return backend

    report = run_kit(Target("fake", factory), modules=["graphs"], quiet=True)
    assert report.exit_code == 0, report.output
    assert len(report.names("passed")) == 5
    assert bool(calls[0]) == (name == VARLEN)
    if name == FLASHINFER:
        captured = [w for w in world.wrappers if w.graph]
        assert captured
        assert world.plans > len(world.wrappers), "recorded ones are planned again before each replay"


def test_page_lists_at_the_edges():
    import numpy as np

    indptr, flat, last = page_lists(np.array([1, 16, 17, 0, 32]), 16, 7, padded=False)
    assert indptr.tolist() == [0, 1, 2, 4, 4, 6]
    assert flat.tolist() == [0, 7, 14, 15, 28, 29]
    assert last.tolist() == [1, 16, 1, 0, 16]
    indptr, flat, last = page_lists(np.array([0, 3]), 16, 7, padded=True)
    assert (indptr.tolist(), flat.tolist(), last.tolist()) == ([0, 1, 2], [0, 7], [1, 3])


# -- XPU ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def xpu(monkeypatch, no_triton):
    install("xpu", monkeypatch, version="2.8.0+xpu")

    def opened(name: str | None = None):
        backend = in_host_memory("xpu")
        backend.open(0, DeviceOptions(attention_backend=name))
        return backend

    return opened


@pytest.mark.parametrize("rows", [RAGGED, DECODE], ids=["ragged", "decode"])
@pytest.mark.parametrize("case", CASES)
def test_ipex_is_handed_the_step(rows, case, xpu, monkeypatch):
    calls = fake_libraries.ipex(monkeypatch)
    sort = Case(head_dim=64, page_size=64, dtype="float16", kv_dtype="float16", layers=2, **CASES[case])
    backend = xpu()
    computed(backend, rows, sort)
    assert calls.count("flash_attn_varlen_func") == 2
    assert calls.count("reshape_and_cache_flash") >= 2
    assert backend.notes()[1:3] == [
        "attention of one query a sequence: IPEX (order: not yet timed)",
        "attention of prompts and chunks: IPEX (order: not yet timed)",
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_ipexs_fused_operations_are_the_references(dtype, xpu, monkeypatch):
    calls = fake_libraries.ipex(monkeypatch)
    backend = xpu()
    x, residual, weight = (torch.randn(*s).to(getattr(torch, dtype)) for s in ((5, 64), (5, 64), (64,)))
    for extra in (None, residual):
        for spec in (NormSpec(eps=1e-5), NormSpec(eps=1e-5, offset=1.0)):
            for got, true in zip(
                backend.rms_norm(x, weight, spec, extra), ops.rms_norm(x, weight, spec, extra), strict=True
            ):
                close(got, true, dtype)
    for activation in ("silu", "gelu", "gelu_tanh"):
        close(backend.gated_act(x, activation), ops.gated_act(x, activation), dtype)
    assert calls == ["rms_norm", "rms_norm", "silu_mul", "gelu_mul", "gelu_mul"]
    calls.clear()
    wide = torch.randn(5, 64)
    assert torch.equal(backend.gated_act(wide, "silu"), ops.gated_act(wide, "silu"))
    assert calls == []


REASONS = {
    "another torch": (dict(version="2.7.10+xpu"), "2.7.10+xpu works with torch 2.7, not 2.8.0+xpu"),
    "the build for CPUs": (
        dict(version="2.8.0"),
        "2.8.0 is the build for CPUs; Intel's own index has the one for GPUs (+xpu)",
    ),
    "a name that it has not": (dict(without="silu_mul"), "2.8.10+xpu cannot be used: AttributeError: "),
}


@pytest.mark.parametrize("case", REASONS)
def test_an_ipex_that_cannot_be_used_says_why_and_the_references_compute(case, xpu, monkeypatch):
    options, why = REASONS[case]
    calls = fake_libraries.ipex(monkeypatch, **options)
    backend = xpu()
    said = [note for note in backend.notes() if note.startswith("not usable: IPEX: ")]
    assert len(said) == 1
    assert said[0].startswith(f"not usable: IPEX: intel-extension-for-pytorch {why}")
    computed(backend, RAGGED, Case(head_dim=64, page_size=64, dtype="bfloat16", kv_dtype="bfloat16"))
    assert calls == []
    with pytest.raises(UnsupportedOnDevice, match="--attention-backend IPEX is not supported on device 'xpu'"):
        xpu(IPEX)


def test_no_ipex(xpu):
    assert "not usable: IPEX: intel-extension-for-pytorch is not installed" in xpu().notes()


def test_where_triton_is_its_kernels_come_first(monkeypatch, with_triton):
    install("xpu", monkeypatch, version="2.8.0+xpu")
    fake_libraries.ipex(monkeypatch)
    backend = in_host_memory("xpu")
    backend.open(0)
    assert backend._others == {}
    assert backend._fused is None


# -- the releases ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("release", [released.FLASHINFER, released.IPEX], ids=lambda r: r.package)
def test_names_and_parameters_are_those_of_the_installed_release(release):
    """Skipped where it is not installed: then the list in released.py is all there is."""
    found = importlib.util.find_spec(release.package)
    if found is None or found.origin is None:
        pytest.skip(f"{release.package} is not installed")
    assert released.in_source(Path(found.origin).parent, release) == release.calls


def test_torchs_varlen_is_as_listed():
    """Read from its source: importing it takes torch's compiler with it."""
    found = importlib.util.find_spec("torch.nn.attention.varlen")
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version not in released.VARLEN:
        pytest.skip(f"torch {torch.__version__} is not one of those that were read")
    body = ast.parse(Path(found.origin).read_text()).body
    function = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == "varlen_attn")
    assert released.parameters(function.args) == released.VARLEN[version]
