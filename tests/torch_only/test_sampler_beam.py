"""Beam search on the logprobs that the sampler gives, against Transformers' generate on a small random model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quire.sampling.beam import BeamSearch
from quire.sampling.logprobs import token_logprobs
from quire.sampling.params import BeamSearchParams
from tests.torch_only.sampling_helpers import HostBackend


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, bos_token_id=None, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("width", [1, 2, 5])
@torch.no_grad()
def test_same_sequences_as_transformers(model, width):
    """Without an end-of-sequence token all sequences have one length: then the two variants must agree."""
    prompt, length = [3, 14, 15], 8
    theirs = model.generate(
        torch.tensor([prompt]), num_beams=width, num_return_sequences=width, max_new_tokens=length, do_sample=False,
        length_penalty=0.0, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    mine = BeamSearch(BeamSearchParams(width, length, length_penalty=0.0), len(prompt), [])
    while not mine.done:
        logits = model(torch.tensor([prompt + list(beam.tokens) for beam in mine.beams])).logits[:, -1].float()
        entries = token_logprobs(HostBackend(), logits, logits.argmax(-1), [mine.candidates_wanted] * len(logits))
        mine.advance([list(zip(e.token_ids[1:], e.logprobs[1:], strict=True)) for e in entries])
    best = mine.best()
    assert [list(b.tokens) for b in best] == theirs.sequences[:, len(prompt) :].tolist()
    if width > 1:
        assert [b.cumulative_logprob for b in best] == pytest.approx(theirs.sequences_scores.tolist(), abs=1e-3)
