"""Frozen descriptions of a model's blocks, and the weights that go with them.

These are the nouns that the model graph and a backend share. Nothing here imports torch, so that reading a model's
shape (for `--help`, memory arithmetic, the scheduler) costs nothing. Tensor fields are typed ``Any``: they hold torch
tensors or a backend's own packed weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class RotarySpec:
    """Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    ``dim`` is how many leading channels of a head rotate (``head_dim`` unless partial). ``scaling`` names the
    context-extension method; ``parameters`` holds its numbers as in the checkpoint's ``rope_scaling``, sorted pairs.
    """

    dim: int
    theta: float = 10000.0
    scaling: Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"] = "none"
    parameters: tuple[tuple[str, Any], ...] = ()
    max_positions: int = 2048
    interleaved: bool = False  # GPT-J order (even/odd pairs) instead of the two halves


@dataclass(frozen=True)
class NormSpec:
    """RMS norm or layer norm over the hidden size; ``offset`` 1.0 means weights are stored minus one (Gemma)."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    offset: float = 0.0


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention. ``window`` counts the query itself: query i sees key j iff i - window < j <= i.

    ``value_dim`` makes it latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1): one KV head, of
    which one vector of ``head_dim`` channels is stored a token; its leading ``value_dim`` channels are also the value.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    kind: Literal["full", "window"] = "full"
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    qk_norm: NormSpec | None = None  # per head, before rotary (Qwen3)
    rotary: RotarySpec | None = None
    value_dim: int | None = None


@dataclass(frozen=True)
class MlpSpec:
    """A gated MLP: ``down(act(gate(x)) * up(x))``."""

    intermediate: int
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"


@dataclass(frozen=True)
class LayerSpec:
    attention: AttentionSpec
    mlp: MlpSpec
    norm: NormSpec = NormSpec()


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a decoder-only model that is not a weight."""

    architecture: str
    vocab_size: int
    hidden: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    max_positions: int
    tied_embeddings: bool = False
    embedding_scale: float = 1.0
    logit_soft_cap: float | None = None
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class KVGroupSpec:
    """Layers whose keys and values share one block table: same kind, window, heads, head size and dtype.

    A page of the group holds ``page_size`` tokens of every layer in ``layers``. Page 0 is never owned by a sequence:
    padding is written there and a block table entry that a window has passed points there. It may hold anything.
    ``latent``: a token's values are channels of its keys and take no room of their own.
    """

    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    dtype: str
    page_size: int = 16
    window: int | None = None
    latent: bool = False


@dataclass(frozen=True)
class KVSpec:
    groups: tuple[KVGroupSpec, ...]

    def group_of(self, layer: int) -> tuple[int, int]:
        """(group index, index of the layer inside the group)."""
        for index, group in enumerate(self.groups):
            if layer in group.layers:
                return index, group.layers.index(layer)
        raise KeyError(layer)


@dataclass
class AttentionWeights:
    """``qkv`` is packed from rows [q; k; v], each head-major: [(Hq + 2 Hkv) * D, hidden]; ``out`` [hidden, Hq * D]."""

    norm: Any
    qkv: Any
    out: Any
    qkv_bias: Any = None
    out_bias: Any = None
    q_norm: Any = None
    k_norm: Any = None
    sinks: Any = None
    cos_sin: Any = None  # rotary table [positions, rotary dim]: cosines then sines, shared between layers


@dataclass
class MlpWeights:
    """``gate_up`` is packed from rows [gate; up]: [2 * intermediate, hidden]; ``down`` [hidden, intermediate]."""

    norm: Any
    gate_up: Any
    down: Any
    gate_up_bias: Any = None
    down_bias: Any = None


@dataclass
class LayerWeights:
    attention: AttentionWeights
    mlp: MlpWeights


@dataclass
class ModelWeights:
    embedding: Any  # [vocab, hidden]
    norm: Any
    head: Any  # packed [vocab, hidden]; the packed embedding when tied
    layers: list[LayerWeights] = field(default_factory=list)


def kv_spec(spec: ModelSpec, dtype: str, page_size: int = 16, max_model_len: int | None = None) -> KVSpec:
    """The model's layers grouped by what their pages look like, groups in order of their first layer.

    A window at least as long as ``max_model_len`` never passes a page, so its layers count as full ones here.
    """
    groups: dict[tuple[int | None, int, int, bool], list[int]] = {}
    for index, layer in enumerate(spec.layers):
        attention = layer.attention
        window = attention.window
        if window is not None and max_model_len is not None and window >= max_model_len:
            window = None
        latent = attention.value_dim is not None
        groups.setdefault((window, attention.kv_heads, attention.head_dim, latent), []).append(index)
    return KVSpec(
        tuple(
            KVGroupSpec(tuple(layers), kv_heads, head_dim, dtype, page_size, window, latent)
            for (window, kv_heads, head_dim, latent), layers in groups.items()
        )
    )
