"""What the cache may hold, from the flag on: fp8 where a device declares it, and what others refuse by name."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from quire import LLM, SamplingParams, plugins
from quire.engine.build import _check_cache, build_engine
from quire.errors import UnsupportedOnDevice
from quire.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec, kv_spec
from tests.device.broken import Host

PROMPT = [5, 17, 300, 42, 8, 99, 200, 11, 64, 3, 77, 120, 250, 31, 9, 10, 222, 56]


class AnyHead(Host):
    capabilities = dataclasses.replace(Host.capabilities, head_sizes=(8, 256), graphs=False)


@pytest.fixture
def host(tiny, monkeypatch):
    """An LLM on the reference operations, which have every cache."""
    registry = plugins.load()
    registry.plugins.append(plugins.Plugin("host", "none", "0", registered={"backends": ["host"]}))
    registry.backends["host"] = AnyHead
    monkeypatch.setattr("quire.llm.build_engine", lambda config: build_engine(config, registry))

    def make(kv_cache_dtype: str, **options) -> LLM:
        common = dict(device="host", dtype="float32", skip_tokenizer_init=True, kv_cache_memory_bytes=8 << 20)
        return LLM(str(tiny), **(common | options), kv_cache_dtype=kv_cache_dtype)

    return make


def logprobs(llm: LLM) -> np.ndarray:
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False, prompt_logprobs=0)
    output = llm.generate([PROMPT], params)[0]
    return np.array([next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]])


@pytest.mark.parametrize(("kind", "near"), [("fp8", 0.2), ("int8", 0.05)])
def test_a_cache_in_eight_bits(host, kind, near):
    """It takes a quarter and the scales; what it rounds moves log-probabilities a little, and is the same in chunks."""
    plain, small = host("auto"), host(kind)
    head = small._engine.spec.layers[0].attention.head_dim
    assert small._engine.memory.page_bytes[0] * 4 * head == plain._engine.memory.page_bytes[0] * (head + 4)
    exact, rounded = logprobs(plain), logprobs(small)
    assert 0 < np.abs(exact - rounded).mean() < near
    chunked = host(kind, max_num_batched_tokens=7, max_num_seqs=7)
    np.testing.assert_allclose(logprobs(chunked), rounded, atol=1e-3)


def test_what_a_device_lacks_is_refused_by_name(tiny):
    with pytest.raises(
        UnsupportedOnDevice, match="--kv-cache-dtype float8_e4m3fn .*; instead: .*--kv-cache-dtype int8"
    ):
        LLM(str(tiny), device="cpu", kv_cache_dtype="fp8")
    attention = AttentionSpec(16, 1, 576, 0.1, value_dim=512)
    spec = ModelSpec("X", 100, 64, (LayerSpec(attention, MlpSpec(8)),), NormSpec(), 64)
    registry = plugins.load()
    for name in ("cpu", "cpu-torch"):
        backend = registry.backend(name)
        with pytest.raises(
            UnsupportedOnDevice, match=f"latent attention of 576 and 512 .*'{name}': its kernels take none"
        ):
            _check_cache(backend, 16, "float32", spec)
        backend.open()
        with pytest.raises(UnsupportedOnDevice, match="latent"):
            backend.allocate_kv(kv_spec(spec, "float32"), [2])
    _check_cache(Host(), 16, "float32", spec)
