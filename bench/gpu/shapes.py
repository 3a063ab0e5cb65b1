"""Shapes of models by their config.json, what a step of them costs, and checkpoints of random weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from model_cost import ModelCost, cost_of
from quire.models.config import read_config
from quire.models.family import WeightMap, find_family
from quire.plugins import load
from quire.quantization import FORMATS, head_format
from quire.weights.checkpoint import weight_bytes

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "dtype": "bfloat16"}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rms_norm_eps": 1e-6, "dtype": "bfloat16"}
ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    # Qwen3-0.6B
    "0.6b": {
        **QWEN3, "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936, "max_position_embeddings": 40960,
        "rope_theta": 1e6, "tie_word_embeddings": True,
    },
    # Llama-3.1-8B
    "8b": {
        **LLAMA, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rope_theta": 5e5, "rope_scaling": ROPE, "tie_word_embeddings": False,
    },
    # Qwen3-32B
    "32b": {
        **QWEN3, "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 25600, "vocab_size": 151936, "max_position_embeddings": 40960,
        "rope_theta": 1e6, "tie_word_embeddings": False,
    },
}  # fmt: skip
TINY = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 256, "vocab_size": 10240, "max_position_embeddings": 2048,
}  # fmt: skip
BLOCK = 32 << 20
"""Numbers of the random block that a checkpoint's tensors are cut from."""


def config_of(shape: str, smoke: bool) -> dict[str, Any]:
    return {**SHAPES[shape], **(TINY if smoke else {})}


def write_config(shape: str, folder: Path, smoke: bool) -> Path:
    """A folder with config.json alone, for ``load_format="dummy"``."""
    target = folder / f"{shape}{'-smoke' if smoke else ''}"
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config_of(shape, smoke)))
    return target


def weights_of(folder: Path) -> list[WeightMap]:
    config = read_config(folder, {})
    return list(find_family(load().models, config).weights(config))


def cost(folder: Path) -> ModelCost:
    """What bench/model_cost.py counts, of a folder that holds config.json."""
    shapes = {part.name: list(part.shape) for weight in weights_of(folder) for part in weight.parts}
    return cost_of(json.loads((folder / "config.json").read_text()), shapes)


def matrix_bytes(folder: Path, quantization: str | None) -> int:
    """Bytes of the matrices that a step reads: all but the embedding's table, unless it is the head too."""
    config = json.loads((folder / "config.json").read_text())
    read = [weight for weight in weights_of(folder) if weight.kind == "matrix"]
    if not config.get("tie_word_embeddings"):
        return weight_bytes(read, "bfloat16", quantization)
    shape = (config["vocab_size"], config["hidden_size"])
    head = FORMATS[head_format(quantization)].bytes(shape) if quantization else 2 * shape[0] * shape[1]
    return weight_bytes(read, "bfloat16", quantization) + head


def write_checkpoint(shape: str, folder: Path, smoke: bool) -> tuple[Path, int]:
    """(folder, bytes) of a checkpoint with random bf16 weights, and a tokenizer that knows one word a token.

    The tensors are cut from one random block, again and again, so that writing takes the time that the disk needs.
    """
    target = write_config(shape, folder, smoke)
    parts = [part for weight in weights_of(target) for part in weight.parts]
    header: dict[str, Any] = {}
    end = 0
    for part in parts:
        begin, end = end, end + 2 * int(np.prod(part.shape))
        header[part.name] = {"dtype": "BF16", "shape": list(part.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    numbers = np.random.default_rng(0).standard_normal(min(BLOCK, end // 2), dtype=np.float32) * np.float32(0.02)
    block = (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with (target / "model.safetensors").open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for start in range(0, end, len(block)):
            stream.write(block[: end - start])
    vocabulary = {f"t{i}": i for i in range(config_of(shape, smoke)["vocab_size"])}
    tokenizer = {
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"},
    }  # fmt: skip
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    return target, end


def room(folder: Path) -> int:
    """Bytes free where ``folder`` is to be."""
    folder.mkdir(parents=True, exist_ok=True)
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
