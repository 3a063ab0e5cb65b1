"""The one decoder that serves every family: ModelSpec says what a model is, Backend what a device is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.hardware import AttentionBatch, Backend, Communicator
from quire.spec import ModelSpec, ModelWeights


class Decoder:
    """A decoder-only transformer. ``hidden`` between :meth:`forward` and :meth:`logits` is the pair (x, residual)
    whose sum is the hidden state: the last addition is left to the final norm, where a device can fuse it.

    With a ``communicator`` each rank holds a share of the heads and of the intermediate size, and the products that
    close a block are summed over the ranks.
    """

    def __init__(
        self, spec: ModelSpec, weights: ModelWeights, backend: Backend, communicator: Communicator | None = None
    ) -> None:
        self.spec, self.weights, self.backend, self.communicator = spec, weights, backend, communicator

    def forward(
        self, token_ids: Tensor, batch: AttentionBatch, kv: Any, plan: Any, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """token_ids int64 [T] -> (x, residual), each [T, hidden]; writes the KV cache at the batch's slots.

        With ``rows`` (int64 [R], indices into T) only those are returned, each [R, hidden]: behind the last layer's
        attention no other token needs what the others became, so its MLP computes these alone.
        """
        backend, last = self.backend, len(self.spec.layers) - 1
        x, residual = backend.embed(token_ids, self.weights.embedding), None
        if self.spec.embedding_scale != 1.0:
            x = x * self.spec.embedding_scale
        for index, (layer, weights) in enumerate(zip(self.spec.layers, self.weights.layers, strict=True)):
            x, residual = backend.attention_block(
                x, residual, weights.attention, layer.attention, layer.norm, kv, index, batch, plan
            )
            if rows is not None and index == last:
                x, residual = x[rows], residual[rows]
                if len(rows) == 0:
                    break
            x = self._sum(x)
            x, residual = backend.gated_mlp(x, residual, weights.mlp, layer.mlp, layer.norm)
            x = self._sum(x)
        return x, residual

    def logits(self, hidden: tuple[Tensor, Tensor | None], rows: Tensor) -> Tensor:
        """Logits float32 [R, vocab] after the tokens at ``rows`` (int64 [R], indices into those of ``hidden``)."""
        x, residual = hidden
        logits = self.backend.final_head(x, residual, rows, self.weights.norm, self.weights.head, self.spec.norm)
        cap = self.spec.logit_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _sum(self, x: Tensor) -> Tensor:
        return x if self.communicator is None else self.communicator.all_reduce(x)
