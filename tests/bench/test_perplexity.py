"""bench/perplexity.py: its numbers against Transformers', and that each variant is what it says."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(SCRIPTS))

import perplexity  # noqa: E402


def test_the_same_numbers_as_transformers(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    import quire_server

    out = tmp_path / "results" / "out.json"
    variants = ["float32", "int4-32", "KV int8"]
    arguments = [argument for name in variants for argument in ("--variant", name)]
    perplexity.main([*arguments, "--conversations", "5", "--scores", "0.02", "--json", str(out)])
    assert capsys.readouterr().out.count("MiB") == 3
    content = json.loads(out.read_text())
    rows = content["rows"]
    assert list(rows) == variants
    assert rows["float32"]["more nats"] == rows["float32"]["change"] == 0
    assert rows["int4-32"]["change"] > rows["KV int8"]["change"] > 0
    assert rows["int4-32"]["weight bytes"] < rows["float32"]["weight bytes"] / 3
    assert rows["KV int8"]["bytes a token of KV"] < rows["float32"]["bytes a token of KV"]
    assert rows["float32"]["scores"]["asked"] > 10

    llm = perplexity.open_llm("demo", perplexity.VARIANTS["float32"], "cpu")
    texts = perplexity.conversations(llm.get_tokenizer(), llm._text.render_chat, 5)
    llm.shutdown()
    assert len(texts) == content["conversations"] >= 5
    model = transformers.AutoModelForCausalLM.from_pretrained(
        Path(quire_server.__file__).parent / "demo", dtype=torch.float32
    )
    total = count = 0.0
    for ids, start in texts:
        with torch.inference_mode():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        own = -scores[torch.arange(start - 1, len(ids) - 1), torch.tensor(ids[start:])]
        total, count = total + float(own.sum()), count + len(own)
    assert count == content["tokens"]
    assert rows["float32"]["nats"] == pytest.approx(total / count, abs=1e-4)
    assert rows["float32"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
