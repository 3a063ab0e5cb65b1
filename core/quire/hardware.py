"""The contract between Quire and a device: the only module of core that a plugin imports.

A vendor subclasses :class:`Backend`, overrides what the device does better, and registers a factory::

    from quire.hardware import Backend, Capabilities, hookimpl
    @hookimpl
    def quire_register_backends(register):
        register("mydevice", lambda: MyBackend())

with an entry point in the group ``quire`` that names the module. Every operation has a default in plain PyTorch under
``quire.reference``: that default *is* the definition, and ``quire conformance --device NAME`` holds an override to it.

Shapes: T new tokens of all sequences in the step, N sequences, M block table width, Hq/Hkv query/KV heads, D head
size, V vocabulary. A floating-point operation returns its input's dtype unless it says otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

from quire.lazy import LazyModules
from quire.spec import AttentionSpec, AttentionWeights, KVGroupSpec, KVSpec, MlpSpec, MlpWeights, NormSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

CONTRACT_VERSION = (1, 0)
"""(major, minor). A plugin built for another major, or for a later minor, is refused by name."""

reference = LazyModules("quire.reference")  # the definitions, imported (and torch with them) when first touched

hookspec, hookimpl = pluggy.HookspecMarker("quire"), pluggy.HookimplMarker("quire")


class UserError(Exception):
    """Something the caller can mend. The command line prints it in one line."""


class UnsupportedOnDevice(UserError):
    """A device lacks an operation (or a variant of it). Raised instead of computing something else."""

    def __init__(self, device: str, operation: str, reason: str, alternatives: Sequence[str] = ()) -> None:
        self.device, self.operation, self.reason, self.alternatives = device, operation, reason, tuple(alternatives)
        hint = f"; instead: {', '.join(alternatives)}" if alternatives else ""
        super().__init__(f"{operation} is not supported on device '{device}': {reason}{hint}")


class DeviceUnavailable(UserError):
    """A device was asked for that cannot be used here. The message says why and what to do."""


class Hooks:
    """Hooks of the entry-point group ``quire``. Each calls ``register`` any number of times (parsers: docs/tool-calling.md)."""

    @hookspec
    def quire_register_backends(self, register: Callable[..., None]) -> None:
        """``register(name, factory, begin=None)``: a device name for ``--device`` and a factory that is called only when used.
        ``begin(weights, largest)``, if any, comes before it, with the bytes of a model and of its largest weight: to start in
        the background what needs no torch, which is imported meanwhile. ``begin(0, 0)``, when loading ends, ends that."""

    @hookspec
    def quire_register_models(self, register: Callable[[str, Callable[[], Any]], None]) -> None:
        """``register(architecture, factory)``: an entry of config.json's ``architectures``; see docs/add-a-model.md."""

    @hookspec
    def quire_register_checkpoints(self, register: Callable[[str, Callable[[], str]], None]) -> None:
        """``register(name, folder)``: a short name usable as MODEL, and a function that returns its folder."""

    @hookspec
    def quire_register_tool_parsers(self, register: Callable[[str, Callable[[], Any]], None]) -> None: ...
    @hookspec
    def quire_register_reasoning_parsers(self, register: Callable[[str, Callable[[], Any]], None]) -> None: ...


@dataclass(frozen=True)
class Capabilities:
    """What a device promises. A promise that fails conformance is a failure; what is not promised is skipped."""

    contract_version: tuple[int, int] | None = None  # what the plugin was built for, as a literal; must be stated
    dtypes: frozenset[str] = frozenset({"float32"})
    kv_dtypes: frozenset[str] = frozenset({"float32"})
    page_sizes: frozenset[int] = frozenset({16})
    head_sizes: tuple[int, int] = (32, 256)  # smallest and largest; every multiple of 8 between
    latent_sizes: frozenset[tuple[int, int]] = frozenset()  # of latent attention: channels of (a key, its value)
    quantization: frozenset[str] = frozenset()
    embed_formats: frozenset[str] = frozenset({"dense"})  # whose packed form embed() takes: a tied table is held once
    graphs: bool = False  # capture() returns a replayable step
    collectives: frozenset[str] = frozenset()  # names of Communicator methods
    batch_invariant: bool = False  # bits do not depend on what else is in the batch
    isas: tuple[str, ...] = ()  # instruction sets that DeviceOptions.isa may name, the best (the default) last
    attention_backends: frozenset[str] = frozenset()  # what --attention-backend may name here, in capitals
    priority: int = 0  # `--device auto` takes the usable device with the highest; below 0: never


@dataclass(frozen=True)
class DeviceInfo:
    index: int
    name: str
    details: str = ""
    threads: int = 0  # of the host, that it computes with by default: engines that share the host divide them


@dataclass(frozen=True)
class MemoryInfo:
    """Bytes we could still take, and bytes there are; ``shared``: other programs live from them, so we leave half free."""

    free: int
    total: int
    shared: bool = False


@dataclass(frozen=True)
class DeviceOptions:
    """What the command line says about a device. A backend refuses by name what it cannot honour."""

    threads: int | None = None
    batch_invariant: bool = False
    isa: str | None = None  # None: the best; Backend.open refuses what capabilities.isas does not name
    attention_backend: str | None = None  # a name of Capabilities.attention_backends; None: the device chooses


@dataclass
class AttentionBatch:
    """What one ragged step looks like to attention. Device tensors, plus host copies for planning without a sync.

    Sequence n owns new tokens query_start[n] .. query_start[n+1]-1 (possibly none); they are its *last* tokens: after
    this step's write it has context_lens[n] tokens, and token i of the group sits in page
    block_tables[g][n, i // page_size] at offset i % page_size. A padding row has context_lens 0 and gets zeros.
    """

    query_start: Tensor  # int32 [N + 1]
    context_lens: Tensor  # int32 [N]
    block_tables: tuple[Tensor, ...]  # per KV group, int32 [N, M]
    slots: tuple[Tensor, ...]  # per KV group, int64 [T]: page * page_size + offset where each new token's KV goes
    positions: Tensor  # int64 [T]
    query_start_host: np.ndarray
    context_lens_host: np.ndarray
    max_query_len: int
    max_context_len: int


@dataclass
class SamplingBatch:
    """Per-row sampling settings, tensors on the device. The ``any_*`` flags let a kernel skip work no row asks for."""

    temperature: Tensor  # float32 [N]; 0 means greedy
    top_k: Tensor  # int32 [N]; 0 means off
    top_p: Tensor  # float32 [N]; 1 means off
    min_p: Tensor  # float32 [N]; 0 means off
    uniform: Tensor  # float64 [N] in [0, 1): the row's noise, a function of (seed, position) alone
    all_greedy: bool = False
    any_top_k: bool = True
    any_top_p: bool = True
    any_min_p: bool = True


class Communicator:
    """Collectives among the ranks of one group. Every rank calls the same method in the same order."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, the same bits on each."""
        raise NotImplementedError

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """Concatenate every rank's x along dim, in rank order."""
        raise NotImplementedError

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Sum over ranks, then this rank's share of dim 0."""
        raise NotImplementedError

    def all_to_all(self, x: Tensor) -> Tensor:
        """Split dim 0 evenly; part r goes to rank r; what came, in rank order."""
        raise NotImplementedError

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """x of rank ``source``, on each."""
        raise NotImplementedError

    def send(self, x: Tensor, to: int) -> None:
        raise NotImplementedError

    def recv(self, like: Tensor, source: int) -> Tensor:
        raise NotImplementedError

    def barrier(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Leave the group."""


class CapturedStep:
    """A recorded step: ``replay()`` runs it again over the static inputs' present contents and returns its output."""

    def replay(self) -> Any:
        raise NotImplementedError


class Backend:
    """One kind of device. Constructing it must be cheap; :meth:`open` takes the device and may be slow."""

    name: str = "unnamed"
    capabilities: Capabilities = Capabilities()

    # -- devices, memory, ordering ---------------------------------------------------------------------------------
    def devices(self) -> list[DeviceInfo]:
        """What is there, cheaply. An empty list, or :class:`DeviceUnavailable` with the reason, when nothing is."""
        raise NotImplementedError

    def memory(self, index: int = 0) -> MemoryInfo:
        raise NotImplementedError

    def open(self, index: int = 0, options: DeviceOptions = DeviceOptions()) -> None:
        """Take device ``index``; called once, before any operation below."""
        if options.isa is not None and options.isa not in self.capabilities.isas:
            usable = [f"--isa {name}" for name in self.capabilities.isas] or ["no --isa"]
            raise UnsupportedOnDevice(self.name, f"--isa {options.isa}", "no such instruction set here", usable)
        self.device_index, self.options = index, options
        wanted, offered = options.attention_backend, sorted(self.capabilities.attention_backends)
        if wanted is not None and wanted.upper() not in offered:
            reason = f"it offers {', '.join(offered)}" if offered else "it has one implementation of its own"
            raise UnsupportedOnDevice(self.name, f"--attention-backend {wanted}", reason, ["leave the flag out"])

    def notes(self) -> list[str]:
        """A line each on what an opened device has chosen, and what it cannot use and why; ``quire doctor`` shows them."""
        return []

    @property
    def device(self) -> torch.device:
        """Where torch tensors of this backend live."""
        raise NotImplementedError

    def stream(self) -> Any:
        """A context manager under which work is queued apart from the default queue (default: no second queue)."""
        return contextlib.nullcontext()

    def event(self) -> Any:
        """Marks the present end of the queue; has ``synchronize()``."""
        return reference.device.DoneEvent()

    def synchronize(self) -> None:
        """Return when everything queued is done."""

    def peak_memory(self, fn: Callable[[], Any]) -> int | None:
        """Run ``fn``: the most bytes it took at once beyond what was held; None, without running it: it cannot be told."""
        return None

    def to_device(self, array: np.ndarray) -> Tensor:
        """A copy of a host array, ordered before what is queued next; the caller may write to its array at once."""
        return reference.device.copied(array, self.device)

    def capture(self, fn: Callable[[], Any], static_inputs: Sequence[Tensor]) -> CapturedStep | None:
        """Record ``fn``, which reads only ``static_inputs``, weights, KV and plans; None: this device cannot."""
        return None

    def communicator(self, rank: int, size: int, address: str) -> Communicator:
        """Join a group of ``size`` ranks that meet at ``tcp://host:port``."""
        return reference.collectives.TorchCommunicator(rank, size, address)

    # -- paged KV --------------------------------------------------------------------------------------------------
    def page_bytes(self, spec: KVGroupSpec) -> int:
        """Bytes of one page over all layers of the group."""
        return reference.paged.page_bytes(spec)

    def allocate_kv(self, spec: KVSpec, pages: Sequence[int], host: bool = False) -> Any:
        """Pools of ``pages[g]`` pages for each group, page 0 included; ``host``: in host memory, for swapped pages."""
        return reference.paged.allocate_kv(spec, pages, "cpu" if host else self.device)

    def write_kv(self, kv: Any, layer: int, k: Tensor, v: Any, batch: AttentionBatch) -> None:
        """Store k, v [T, Hkv, D] at the batch's slots; v is None where attention is latent."""
        reference.paged.write_kv(kv, layer, k, v, batch)

    def copy_pages(self, source: Any, target: Any, group: int, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy page a of ``source`` to page b of ``target`` for each (a, b); either pool may be the host's."""
        reference.paged.copy_pages(source, target, group, pairs)

    def plan_attention(self, batch: AttentionBatch, spec: KVSpec, reuse: Any = None) -> Any:
        """What attention needs to know of a step, made once; ``reuse``: a captured step's plan, brought up to date itself."""
        return reference.paged.plan_attention(batch, spec, reuse)

    def attention(self, q: Tensor, kv: Any, layer: int, plan: Any, spec: AttentionSpec, sinks: Any = None) -> Tensor:
        """q [T, Hq, D] against the paged KV of ``layer``: prefill, chunks, decode and drafts in one ragged, causal call."""
        return reference.paged.attention(q, kv, layer, plan, spec, sinks)

    # -- weights and pointwise operations --------------------------------------------------------------------------
    def pack_weight(self, raw: Mapping[str, Tensor], format: str = "dense") -> Any:
        """raw["weight"] [out, in], as it is or rounded (``reference.quantize``), copied once into the device's own layout."""
        return reference.ops.pack_weight(raw, format, self)

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """x [T, in] @ weight.T + bias -> [T, out]; accumulates in float32 or better."""
        return reference.ops.linear(x, weight, bias)

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        """Rows of table [V, hidden] for ids int64 [T]; of a packed one, if its format is among ``embed_formats``."""
        return reference.ops.embed(ids, table)

    def rms_norm(self, x: Tensor, weight: Tensor, spec: NormSpec, residual: Any = None) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual) over the last dim; without residual (norm(x), x)."""
        return reference.ops.rms_norm(x, weight, spec, residual)

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, spec: NormSpec, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`rms_norm`, with mean and variance."""
        return reference.ops.layer_norm(x, weight, bias, spec, residual)

    def rotary(
        self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Rotate the leading channels of q [T, Hq, D] and k [T, Hkv, D] by cos_sin[positions] (float32, cos | sin)."""
        return reference.ops.rotary(q, k, positions, cos_sin, interleaved)

    def gated_act(self, x: Tensor, activation: str) -> Tensor:
        """act(x[:, :I]) * x[:, I:] for x [T, 2 I]."""
        return reference.ops.gated_act(x, activation)

    def moe(self, x: Tensor, gates: Tensor, experts: Tensor, gate_up: Any, down: Any, activation: str) -> Tensor:
        """Sum over j of gates[:, j] * mlp[experts[:, j]](x); gate_up [E, 2 I, hidden], down [E, hidden, I]."""
        return reference.ops.moe(x, gates, experts, gate_up, down, activation)

    def route(self, logits: Tensor, chosen: int, score: str, normalize: bool = True, bias: Any = None) -> Any:
        """Gates float32 and experts int64 [T, chosen]: the largest softmax or sigmoid of logits [T, E], plus bias to choose."""
        return reference.ops.route(logits, chosen, score, normalize, bias)

    def penalize(self, logits: Tensor, rows: Tensor, ids: Tensor, penalties: Tensor) -> None:
        """Lower logits[rows, ids] (int64 [M], no pair twice) in place by (count, repetition, frequency, presence) [4, M]."""
        reference.sampling.penalize(logits, rows, ids, penalties)

    def sample(self, logits: Tensor, settings: SamplingBatch) -> Tensor:
        """One token per row of logits float32 [N, V] -> int64 [N]: temperature, min-p, top-k, top-p, inverse CDF."""
        return reference.sampling.sample(logits, settings)

    def logprobs(self, logits: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """(ids int64 [N, 1 + count]: chosen, then the likeliest; their log-probabilities float32; chosen's rank [N])."""
        return reference.sampling.logprobs(logits, chosen, count)

    # -- compound operations: a device that fuses overrides these --------------------------------------------------
    def attention_block(
        self, x: Tensor, residual: Tensor | None, weights: AttentionWeights, spec: AttentionSpec, norm: NormSpec,
        kv: Any, layer: int, batch: AttentionBatch, plan: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(projection of attention(norm(x + residual)), x + residual), before any sum over ranks."""
        return reference.blocks.attention_block(self, x, residual, weights, spec, norm, kv, layer, batch, plan)

    def gated_mlp(
        self, x: Tensor, residual: Tensor | None, weights: MlpWeights, spec: MlpSpec, norm: NormSpec
    ) -> tuple[Tensor, Tensor]:
        """(down(act(gate) * up) of norm(x + residual), x + residual), before any sum over ranks."""
        return reference.blocks.gated_mlp(self, x, residual, weights, spec, norm)

    def final_head(
        self, x: Tensor, residual: Tensor | None, rows: Tensor, norm_weight: Tensor, head: Any, norm: NormSpec
    ) -> Tensor:
        """Logits float32 [len(rows), V] of the given rows of norm(x + residual)."""
        return reference.blocks.final_head(self, x, residual, rows, norm_weight, head, norm)
