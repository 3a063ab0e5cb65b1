"""Backends that are wrong in one way each, and one that is right and captures: what the kit is tested with."""

from __future__ import annotations

import dataclasses

import torch

from quire.conformance.kit import COLLECTIVES
from quire.hardware import AttentionBatch, Backend, Capabilities, CapturedStep, DeviceInfo, MemoryInfo
from quire.quantization import FORMATS
from quire.reference import paged, quantize
from quire.reference.collectives import TorchCommunicator


class Replayed(CapturedStep):
    """The plainest capture: run the function again over the static inputs."""

    def __init__(self, fn) -> None:
        self.fn = fn

    def replay(self):
        return self.fn()


class Host(Backend):
    """The reference operations in host memory, with captured steps and every promise that they keep."""

    capabilities = Capabilities(
        contract_version=(1, 0),
        dtypes=frozenset({"float32", "bfloat16"}),
        kv_dtypes=frozenset({"float32", "bfloat16", "int8", "float8_e4m3fn"}),
        page_sizes=frozenset({16, 32}),
        head_sizes=(32, 64),
        latent_sizes=frozenset({(576, 512), (40, 16)}),
        quantization=frozenset({"int8", "int4", "w8a8", "fp8"}),
        graphs=True,
        collectives=frozenset(COLLECTIVES),
    )

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def devices(self):
        return [DeviceInfo(0, "host memory")]

    def memory(self, index=0):
        return MemoryInfo(1 << 30, 1 << 30)

    def capture(self, fn, static_inputs):
        return Replayed(fn)


class WindowOffByOne(Host):
    def attention(self, q, kv, layer, plan, spec, sinks=None):
        if spec.window is not None:
            spec = dataclasses.replace(spec, window=spec.window + 1)
        return super().attention(q, kv, layer, plan, spec, sinks)


class WrongPage(Host):
    """Reads the table's next entry from the fourth page on."""

    def attention(self, q, kv, layer, plan, spec, sinks=None):
        group, _ = kv.place[layer]
        tables = list(plan.batch.block_tables)
        table = tables[group].clone()
        if table.shape[1] > 4:
            table[:, 3] = table[:, 4]
        tables[group] = table
        batch = dataclasses.replace(plan.batch, block_tables=tuple(tables))
        return super().attention(q, kv, layer, paged.AttentionPlan(batch, plan.spec), spec, sinks)


class ReadsUnusedSlots(Host):
    """Masks scores but lets weight zero times whatever a slot holds into the sum: 0 * NaN is NaN."""

    def attention(self, q, kv, layer, plan, spec, sinks=None):
        out = super().attention(q, kv, layer, plan, spec, sinks)
        group, index = kv.place[layer]
        values = kv.pools[group][index][1]  # [pages, page size, Hkv, D]
        starts = plan.batch.query_start_host.tolist()
        for n, length in enumerate(plan.batch.context_lens_host.tolist()):
            pages = plan.batch.block_tables[group][n, : -(-length // values.shape[1])].long()
            unused = values[pages].flatten(0, 1)[length:]
            out[starts[n] : starts[n + 1]] += (0 * unused.float()).sum().to(out.dtype)
        return out


class ReadsFreedPages(Host):
    """Reads page 0 for keys that the window has passed, and weighs them with zero."""

    def attention(self, q, kv, layer, plan, spec, sinks=None):
        out = super().attention(q, kv, layer, plan, spec, sinks)
        group, index = kv.place[layer]
        if spec.window is not None and len(out):
            out = out + (0 * kv.pools[group][index][1][0].float()).sum().to(out.dtype)
        return out


class BatchDependent(Host):
    """Sums in another order when there are many rows, and says that it does not."""

    capabilities = dataclasses.replace(Host.capabilities, batch_invariant=True)

    def linear(self, x, weight, bias=None):
        if len(x) <= 16 or x.dtype == torch.float64:
            return torch.stack([super(BatchDependent, self).linear(row[None], weight, bias)[0] for row in x]) if len(x) else (
                super().linear(x, weight, bias)
            )  # fmt: skip
        half = x.shape[1] // 2
        wide = x.float()
        out = wide[:, :half] @ weight[:, :half].float().T + wide[:, half:] @ weight[:, half:].float().T
        return (out if bias is None else out + bias.float()).to(x.dtype)


class StalePlan(Host):
    """Makes a new plan where it was to bring the old one up to date: a captured step goes on with the old."""

    def plan_attention(self, batch, spec, reuse=None):
        batch = dataclasses.replace(batch, context_lens_host=batch.context_lens_host.copy())
        return super().plan_attention(batch, spec)


class OneScaleForAToken(Host):
    """In 8 bits, the scale of the largest head of a token for all of them."""

    def write_kv(self, kv, layer, k, v, batch):
        super().write_kv(kv, layer, k, v, batch)
        group, index = kv.place[layer]
        if kv.scales[group] is not None:
            slots, size = batch.slots[group], kv.pools[group].shape[3]
            for side, x in enumerate((k,) if v is None else (k, v)):
                codes, scales = paged.to_eight_bits(x.flatten(1), kv.pools[group].dtype)
                kv.pools[group][index].view(torch.int8)[side].flatten(0, 1)[slots] = codes.view(torch.int8).view(
                    x.shape
                )
                kv.scales[group][index, side, slots // size, :, slots % size] = scales[:, None]


class LatentValuesAtTheEnd(Host):
    """Takes the last channels of a latent key for its value."""

    def attention(self, q, kv, layer, plan, spec, sinks=None):
        if spec.value_dim is None:
            return super().attention(q, kv, layer, plan, spec, sinks)
        whole = dataclasses.replace(spec, value_dim=spec.head_dim)
        return super().attention(q, kv, layer, plan, whole, sinks)[..., -spec.value_dim :]


class WrongHead(Host):
    """Query head h reads KV head h % Hkv instead of h // group."""

    def attention(self, q, kv, layer, plan, spec, sinks=None):
        group = spec.heads // spec.kv_heads
        order = torch.arange(spec.heads).view(group, spec.kv_heads).T.reshape(-1)
        out = torch.empty_like(q)
        out[:, order] = super().attention(q[:, order], kv, layer, plan, spec, None if sinks is None else sinks[order])
        return out


class RotaryOffByOne(Host):
    def rotary(self, q, k, positions, cos_sin, interleaved=False):
        return super().rotary(q, k, (positions + 1).clamp(max=len(cos_sin) - 1), cos_sin, interleaved)


class IgnoresNoise(Host):
    def sample(self, logits, settings):
        return super().sample(logits, dataclasses.replace(settings, uniform=torch.rand_like(settings.uniform)))


class NoSoftCap(Host):
    def attention(self, q, kv, layer, plan, spec, sinks=None):
        return super().attention(q, kv, layer, plan, dataclasses.replace(spec, soft_cap=None), sinks)


class NoSinks(Host):
    def attention(self, q, kv, layer, plan, spec, sinks=None):
        return super().attention(q, kv, layer, plan, spec)


class CopiesFirstLayer(Host):
    def copy_pages(self, source, target, group, pairs):
        for a, b in list(pairs):
            target.pools[group][0, :, b] = source.pools[group][0, :, a]


class CopiesOneByOne(Host):
    """A page that an earlier pair has overwritten is copied on."""

    def copy_pages(self, source, target, group, pairs):
        for a, b in pairs:
            target.pools[group][:, :, b] = source.pools[group][:, :, a]


class ForgetsBias(Host):
    def linear(self, x, weight, bias=None):
        return super().linear(x, weight, None if x.dtype == torch.bfloat16 else bias)


class SumsInBfloat16(Host):
    def linear(self, x, weight, bias=None):
        if x.dtype != torch.bfloat16 or not len(x):
            return super().linear(x, weight, bias)
        out = torch.zeros(len(x), len(weight), dtype=x.dtype)
        for part in range(0, x.shape[1], 64):
            out += x[:, part : part + 64] @ weight[:, part : part + 64].T
        return out if bias is None else out + bias


class KeepsTheCallersMemory(Host):
    def pack_weight(self, raw, format="dense"):
        return raw["weight"] if format == "dense" else super().pack_weight(raw, format)


class OneScaleForARow(Host):
    """Rounds with one scale for a row where the format says one for each group."""

    def pack_weight(self, raw, format="dense"):
        weight = raw["weight"]
        if format == "dense":
            return super().pack_weight(raw, format)
        most = 2 ** (FORMATS[format].bits - 1) - 1
        scale = weight.abs().amax(-1, keepdim=True) / most
        return (weight / scale).round() * scale


class OneScaleForABatch(Host):
    """Rounds a product's input with one scale for all rows where the format says one for each."""

    def linear(self, x, weight, bias=None):
        if isinstance(weight, quantize.InputsRounded) and len(x):
            x = quantize.rounded_rows(x.reshape(1, -1), weight.type).view_as(x)
            weight = weight.weight
        return super().linear(x, weight, bias)


class LastOfEquals(Host):
    def route(self, logits, chosen, score, normalize=True, bias=None):
        turned = None if bias is None else bias.flip(-1)
        gates, experts = super().route(logits.flip(-1), chosen, score, normalize, turned)
        return gates, logits.shape[1] - 1 - experts


class GatesBeforeTheActivation(Host):
    def moe(self, x, gates, experts, gate_up, down, activation):
        out = torch.zeros_like(x)
        for j in range(experts.shape[1]):
            scaled = x * gates[:, j, None].to(x.dtype)
            out += super().moe(scaled, torch.ones_like(gates[:, :1]), experts[:, j, None], gate_up, down, activation)
        return out


class RowsOfAnotherLayout(Host):
    """Packs a layout of its own, with products that know it, but still declares that rows are looked up in it."""

    def pack_weight(self, raw, format="dense"):
        return super().pack_weight(raw, format).flip(0)

    def linear(self, x, weight, bias=None):
        return super().linear(x, weight.flip(0), bias)


class EpsOutsideTheRoot(Host):
    def rms_norm(self, x, weight, spec, residual=None):
        s = x if residual is None else x + residual
        wide = s.double() if s.dtype == torch.float64 else s.float()
        normed = wide / (wide.square().mean(-1, keepdim=True).sqrt() + spec.eps)
        return (normed * (weight.to(wide.dtype) + spec.offset)).to(x.dtype), s


class PaddingIsNotZero(Host):
    def attention(self, q, kv, layer, plan, spec, sinks=None):
        out = super().attention(q, kv, layer, plan, spec, sinks)
        batch = plan.batch
        starts = batch.query_start_host.tolist()
        for n, length in enumerate(batch.context_lens_host.tolist()):
            if length == 0:
                out[starts[n] : starts[n + 1]] = 1
        return out


class MixesGroups(Host):
    """Uses the first group's slots for every group."""

    def write_kv(self, kv, layer, k, v, batch: AttentionBatch):
        super().write_kv(kv, layer, k, v, dataclasses.replace(batch, slots=(batch.slots[0],) * len(batch.slots)))


class KeepsTheHostsArray(Host):
    def to_device(self, array):
        return torch.from_numpy(array)


class TopPWithoutTheLast(Host):
    """Leaves out the token that reaches top_p."""

    def sample(self, logits, settings):
        return super().sample(logits, dataclasses.replace(settings, top_p=settings.top_p * 0.9))


class RankOfEquals(Host):
    """Counts the chosen token, and those as likely, among the likelier ones."""

    def logprobs(self, logits, chosen, count):
        ids, values, _ = super().logprobs(logits, chosen, count)
        return ids, values, (logits >= logits.gather(1, chosen[:, None])).sum(1)


class Favours(TorchCommunicator):
    """Adds up with this rank's own part last and rounded: other bits, and with them other text, on each rank."""

    def all_reduce(self, x):
        return super().all_reduce(x) * (
            1 + self.rank * 2.0**-20 if x.dtype != torch.bfloat16 else 1 + self.rank * 2.0**-7
        )


class RankDependent(Host):
    def communicator(self, rank, size, address):
        return Favours(rank, size, address)


class DeclaresGraphs(Host):
    def capture(self, fn, static_inputs):
        return None


class FrozenOutput(Host):
    """Captures the result instead of the work."""

    def capture(self, fn, static_inputs):
        result = fn()
        return Replayed(lambda: result)


CAUGHT_BY = {
    WindowOffByOne: ("attention", "window"),
    WrongPage: ("attention", "page_sizes"),
    ReadsUnusedSlots: ("attention", "page_sizes"),
    ReadsFreedPages: ("attention", "freed_pages_are_not_read"),
    BatchDependent: ("company", "linear"),
    StalePlan: ("graphs", "plans_are_brought_up_to_date"),
    OneScaleForAToken: ("attention", "kv_dtypes_with_every_dtype"),
    LatentValuesAtTheEnd: ("attention", "latent"),
    WrongHead: ("attention", "grouped_queries"),
    RotaryOffByOne: ("operations", "rotary"),
    IgnoresNoise: ("sampling", "the_noise_decides"),
    NoSoftCap: ("attention", "soft_cap"),
    NoSinks: ("attention", "sinks"),
    CopiesFirstLayer: ("pages", "copy_within_the_pool"),
    CopiesOneByOne: ("pages", "copies_of_one_call_do_not_see_each_other"),
    ForgetsBias: ("operations", "linear"),
    SumsInBfloat16: ("operations", "linear_sums_in_float32"),
    KeepsTheCallersMemory: ("operations", "what_is_packed_is_the_devices_own"),
    OneScaleForARow: ("operations", "quantized_groups_have_scales_of_their_own"),
    OneScaleForABatch: ("operations", "quantized_linear"),
    LastOfEquals: ("operations", "route"),
    GatesBeforeTheActivation: ("operations", "quantized_moe"),
    RowsOfAnotherLayout: ("operations", "embed_of_a_packed_table"),
    EpsOutsideTheRoot: ("operations", "norm_of_small_numbers"),
    PaddingIsNotZero: ("attention", "padding_rows_are_zero"),
    MixesGroups: ("attention", "two_groups_of_layers"),
    KeepsTheHostsArray: ("memory", "to_device_is_a_copy"),
    TopPWithoutTheLast: ("sampling", "clear_cut_rows_follow_the_definition"),
    RankOfEquals: ("sampling", "logprobs"),
    DeclaresGraphs: ("graphs", "replay_equals_eager"),
    FrozenOutput: ("graphs", "replay_equals_eager"),
}
"""Each broken backend and the named case (area, name) that must fail on it."""
