"""What a step of a model costs, from its checkpoint alone, and what a machine's limits then allow.

Counted are the matrices (norms and biases are nothing beside them) and the KV cache. The bound is a roofline: a step
takes at least the time to read what it must read, and at least the time to multiply what it must multiply.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEAD = ("lm_head.weight", "output.weight")
EMBEDDING = ("embed_tokens.weight", "wte.weight")


@dataclass(frozen=True)
class Workload:
    requests: int
    prompt: int
    output: int

    def __str__(self) -> str:
        return f"{self.requests} x ({self.prompt} -> {self.output})"

    @property
    def counted_tokens(self) -> int:
        """What tokens/s are of: the output, or the prompt where the output is only its proof."""
        return self.requests * (self.output if self.output > 1 else self.prompt)


@dataclass(frozen=True)
class Decode:
    """``tokens`` further tokens of each of ``requests`` whose context is ``context`` tokens already. The prompt is not
    part of it."""

    requests: int
    context: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.requests} x decode at {self.context:,}"

    @property
    def counted_tokens(self) -> int:
        return self.requests * self.tokens


@dataclass(frozen=True)
class ModelCost:
    """``body`` and ``head``: parameters of the layers' matrices and of the output projection (which only positions that
    are sampled need). ``kv_values``: numbers a token leaves in the cache. ``attention``: heads x head size x layers."""

    body: int
    head: int
    kv_values: int
    attention: int
    vocab_size: int

    def seconds(
        self,
        work: Workload | Decode,
        bytes_per_s: float,
        flop_per_s: float,
        value_bytes: float = 2.0,
        weight_bytes: float | None = None,
    ) -> float:
        """Least time for a workload whose requests all run at once; pass infinity for a limit that is to be ignored.

        ``value_bytes``: of a number in the cache, and of a weight unless ``weight_bytes`` says otherwise.
        """
        r = work.requests
        matrix_bytes = (self.body + self.head) * (value_bytes if weight_bytes is None else weight_bytes)
        if isinstance(work, Decode):
            total, contexts = 0.0, range(work.context + 1, work.context + work.tokens + 1)
        else:
            # Prompt positions attend to themselves and what precedes them: p / 2 on average, 2 products of 2 operations.
            p = work.prompt
            flops = r * (2 * self.body * p + 2 * self.head + 4 * self.attention * p * (p + 1) / 2)
            total, contexts = max(matrix_bytes / bytes_per_s, flops / flop_per_s), range(p + 1, p + work.output)
        for context in contexts:
            moved, flops = self.decode_step(r, context, matrix_bytes, value_bytes)
            total += max(moved / bytes_per_s, flops / flop_per_s)
        return total

    def decode_step(
        self, requests: int, context: float, matrix_bytes: float, value_bytes: float = 2.0
    ) -> tuple[float, float]:
        """(bytes, operations) of a step in which each request, at ``context`` tokens on average, gets one more."""
        moved = matrix_bytes + value_bytes * requests * self.kv_values * context
        return moved, requests * (2 * (self.body + self.head) + 4 * self.attention * context)


def read_cost(folder: Path) -> ModelCost:
    """Of a checkpoint in the Hugging Face layout with dense layers (each weight used once a token)."""
    return cost_of(json.loads((folder / "config.json").read_text(encoding="utf-8")), tensor_shapes(folder))


def cost_of(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> ModelCost:
    """Of config.json's content and the checkpoint's tensors by name."""
    body = head = embedding = 0
    for name, shape in shapes.items():
        if len(shape) != 2:
            continue
        size = shape[0] * shape[1]
        if name.endswith(HEAD):
            head = size
        elif name.endswith(EMBEDDING):
            embedding = size
        else:
            body += size
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return ModelCost(
        body=body,
        head=head or embedding,  # tied: the table is read whole as the output projection
        kv_values=2 * layers * kv_heads * head_size,
        attention=layers * heads * head_size,
        vocab_size=config["vocab_size"],
    )


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Name to shape of every tensor in the folder's safetensors files, from their headers."""
    shapes: dict[str, list[int]] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SystemExit(f"{folder}: it holds no .safetensors file")
    for path in files:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return shapes
