"""Paged attention over ragged steps against float64. Every page is somewhere else, and every slot that nobody wrote
holds NaN (see world.py)."""

from __future__ import annotations

import pytest
import torch

from quire.conformance.world import Float64, Paper, Row, Shape, Stage, close, compare, usual_head, usual_kv


def ragged(size: int) -> list[Row]:
    """Lengths around the page, whole prompts, chunks, decodes, drafts, sequences without new tokens, padding."""
    return [
        Row(1, 1), Row(size - 1, size - 1), Row(size, 1), Row(size + 1, 1), Row(0, 0), Row(size + 1, size + 1),
        Row(3 * size - 1, 2), Row(2 * size, 0), Row(0, 1), Row(2 * size + 1, size), Row(5 * size + 3, 4), Row(7, 7),
    ]  # fmt: skip


@pytest.fixture
def shape(primary, primary_kv, size, backend):
    return dict(dtype=primary, kv_dtype=primary_kv, page_size=size, head_dim=usual_head(backend))


def test_page_sizes(backend, shape, page_size):
    compare(backend, ragged(page_size), Shape(**{**shape, "page_size": page_size}))


def test_head_sizes(backend, shape, size, head_size):
    compare(backend, ragged(size), Shape(**{**shape, "head_dim": head_size}))


def test_dtypes(backend, shape, size, dtype):
    compare(backend, ragged(size), Shape(**{**shape, "dtype": dtype, "kv_dtype": usual_kv(backend, dtype)}))


def test_kv_dtypes(backend, shape, size, kv_dtype):
    compare(backend, ragged(size), Shape(**{**shape, "kv_dtype": kv_dtype}))
    compare(backend, ragged(size), Shape(**{**shape, "kv_dtype": kv_dtype}, window=size - 1, sinks=True, layers=2))


def test_kv_dtypes_with_every_dtype(backend, shape, size, dtype, kv_dtype):
    """Heads of very different size in one token: a cache with scales needs one for each."""
    shaped = Shape(**{**shape, "dtype": dtype, "kv_dtype": kv_dtype})
    paper = Paper(ragged(size), shaped)
    paper.values *= torch.tensor([1.0, 256.0])[:, None]  # a power of two: fp8 keeps what it is given
    device, truth = Stage(backend, paper), Stage(Float64(), paper, "float64")
    given, expected = device.attend(), truth.attend()
    for heads in (slice(0, 2), slice(2, 4)):
        close(given[:, heads], expected[:, heads], dtype, factor=3.0, what=f"attention of heads {heads}")


def latent(shape: dict, size: tuple[int, int], **more) -> Shape:
    return Shape(**{**shape, "head_dim": size[0], "value_dim": size[1], "kv_heads": 1, "heads": 16, **more})


@pytest.mark.parametrize("heads", [1, 16, 128])
def test_latent(backend, shape, size, latent_size, heads):
    """Values that are channels of the keys: prompts, chunks, decodes and drafts, with few and with many heads."""
    compare(backend, ragged(size), latent(shape, latent_size, heads=heads, layers=2 if heads == 16 else 1))


def test_latent_page_sizes(backend, shape, page_size, latent_size):
    rows = [Row(page_size - 1, 2), Row(page_size, 1), Row(page_size + 1, 3), Row(2 * page_size + 1, 1), Row(0, 1)]
    compare(backend, rows, latent({**shape, "page_size": page_size}, latent_size))


def test_latent_kv_dtypes(backend, shape, size, kv_dtype, latent_size):
    compare(backend, ragged(size), latent({**shape, "kv_dtype": kv_dtype}, latent_size))


def test_latent_of_every_dtype(backend, shape, size, dtype, latent_size):
    compare(backend, ragged(size), latent({**shape, "dtype": dtype, "kv_dtype": usual_kv(backend, dtype)}, latent_size))


def test_latent_of_a_long_context(backend, shape, latent_size):
    compare(backend, [Row(1100, 1), Row(300, 3), Row(3, 1)], latent(shape, latent_size))


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (8, 2), (14, 2), (6, 3), (4, 1), (32, 1)])
def test_grouped_queries(backend, shape, size, heads, kv_heads):
    compare(backend, ragged(size), Shape(**shape, heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize(
    ("pages", "more"), [(0, 1), (0, 3), (1, -1), (1, 0), (1, 1), (2, 5), (100, 0)], ids=lambda n: str(n)
)
def test_window(backend, shape, size, pages, more):
    compare(backend, ragged(size), Shape(**shape, window=pages * size + more))


@pytest.mark.parametrize("cap", [0.5, 5.0])
def test_soft_cap(backend, shape, size, cap):
    compare(backend, ragged(size), Shape(**shape, soft_cap=cap))


@pytest.mark.parametrize("window", [None, 5])
def test_sinks(backend, shape, size, window):
    compare(backend, ragged(size), Shape(**shape, sinks=True, window=window))


def test_every_layer_of_a_group(backend, shape, size):
    compare(backend, ragged(size), Shape(**shape, layers=3))


def test_decode_of_many_sequences(backend, shape, size):
    compare(backend, [Row(1 + (37 * n) % 150, 1) for n in range(70)], Shape(**shape))


def test_long_contexts(backend, shape):
    compare(backend, [Row(2100, 1), Row(1025, 1025), Row(700, 33), Row(3, 1)], Shape(**shape, heads=4, kv_heads=1))


def test_scores_that_would_overflow(backend, shape, size):
    """Scores in the hundreds need the maximum taken off before the exponential."""
    shaped = Shape(**shape)
    paper = Paper(ragged(size), shaped)
    paper.q *= 60.0
    device, truth = Stage(backend, paper), Stage(Float64(), paper, "float64")
    close(device.attend(), truth.attend(), shaped.dtype, factor=30.0, what="attention with sharp scores")


def test_padding_rows_are_zero(backend, shape, size):
    paper = Paper([Row(size + 3, 2), Row(0, 3), Row(5, 1), Row(0, 1)], Shape(**shape))
    out = Stage(backend, paper).attend().cpu()
    assert not out[2:5].any(), "tokens of a row with context 0 are not zero"
    assert not out[6].any()
    assert out[:2].any()


def test_a_step_of_nothing(backend, shape):
    stage = Stage(backend, Paper([Row(0, 0), Row(12, 0)], Shape(**shape)))
    assert stage.read().shape == (0, 4, stage.paper.shape.head_dim)


@pytest.mark.parametrize("window", [None, 9])
def test_freed_pages_are_not_read(backend, shape, size, window):
    """A sequence ends and its pages are poisoned, page 0 too: the others do not notice."""
    shaped = Shape(**shape, window=window)
    paper = Paper([Row(3 * size + 1, 1), Row(2 * size, 2), Row(size + 1, 1)], shaped)
    device, truth = Stage(backend, paper), Stage(Float64(), paper, "float64")
    device.store(past=False)
    freed = [int(page) for page in paper.tables[1] if page]
    device.poison([0, *freed])
    expected, given = truth.attend(), device.read()
    keep = torch.tensor([0, 3])
    close(given[keep.to(given.device)], expected[keep], shaped.dtype, what="attention beside a freed sequence")


def test_slots_past_the_end_are_not_read(backend, shape, size):
    """The rest of a sequence's last page may hold what another left there, finite and plausible."""
    shaped = Shape(**shape)
    longer = Paper([Row(2 * size - 2, 2 * size - 2)], shaped)
    stage = Stage(backend, longer)
    stage.store(past=False)
    shorter = Paper([Row(size + 2, 1)], shaped)
    shorter.tables, shorter.pages = longer.tables, longer.pages
    truth = Stage(Float64(), shorter, "float64").attend()
    stage.paper = shorter
    close(stage.read(), truth, shaped.dtype, what="attention in a page with leftovers")


def test_two_groups_of_layers(backend, shape, size):
    """Layers of two kinds have their own pools, block tables and slots in one step."""
    import dataclasses

    from quire.spec import KVSpec

    full, windowed = Shape(**shape), Shape(**shape, window=size + 1)
    rows = ragged(size)
    papers = [Paper(rows, full, seed=1), Paper(rows, windowed, seed=2)]

    def outputs(backend, dtype):
        groups = [paper.shape.kv(dtype).groups[0] for paper in papers]
        spec = KVSpec((groups[0], dataclasses.replace(groups[1], layers=(1,))))
        stage = Stage(backend, papers[0], dtype)
        stage.kv = backend.allocate_kv(spec, [papers[0].pages, papers[1].pages])
        batches = {}
        for past in (True, False):
            arrays = [paper.arrays(past) for paper in papers]
            joined = dataclasses.replace(
                arrays[0],
                block_tables=tuple(a.block_tables[0] for a in arrays),
                slots=tuple(a.slots[0] for a in arrays),
            )
            batches[past] = joined.to_device(backend)
            for layer, paper in enumerate(papers):
                tokens = paper.tokens(past)
                k, v = (stage.on(side[0, tokens]) for side in (paper.keys, paper.values))
                backend.write_kv(stage.kv, layer, k, v, batches[past])
        plan = backend.plan_attention(batches[False], spec)
        return [
            backend.attention(stage.on(paper.q), stage.kv, layer, plan, paper.shape.attention())
            for layer, paper in enumerate(papers)
        ]

    for layer, (a, b) in enumerate(zip(outputs(backend, None), outputs(Float64(), "float64"), strict=True)):
        close(a, b, full.dtype, what=f"attention of group {layer}")
