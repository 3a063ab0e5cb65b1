"""Compile every kernel in every configuration for a GPU that is not there, and print what came of it as JSON.

``python -m tests.triton.aot sm_90``: a list of {kernel, name, shared, spills, registers, matrix}. ``spills``: bytes of
registers stored to memory (NVIDIA: what ptxas says; AMD: what the code object's notes say); ``matrix``: matrix
instructions found in the assembly.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from quire_triton import configs
from quire_triton.kernels import (
    attention,
    attention_merge,
    copy_pages,
    gated_act,
    layer_norm,
    linear,
    logit_groups,
    logit_peaks,
    logit_sums,
    moe,
    penalize,
    quantize_rows,
    rms_norm,
    rotary,
    route,
    sample,
    sample_wide,
    write_kv,
)
from quire_triton.kernels import logprobs as logprobs_kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
ONLY_PRODUCTS = {"sm_86", "sm_89", "sm_120", "gfx90a", "gfx950"}
"""Architectures whose other kernels take the configurations of a kindred one, and are not compiled for it here."""
MATRIX = r"wgmma\.mma_async|tcgen05\.mma|\bmma\.sync|v_mfma_|v_wmma_"
POINTERS = {
    "table_ptr": "*i32", "start_ptr": "*i32", "lens_ptr": "*i32", "tiles_ptr": "*i32", "pairs_ptr": "*i32",
    "slots_ptr": "*i64", "positions_ptr": "*i64", "part_ptr": "*fp32", "stats_ptr": "*fp32",
    "scales_ptr": "*fp32", "zeros_ptr": "*fp32", "key_scales_ptr": "*fp32", "value_scales_ptr": "*fp32",
    "top_k_ptr": "*i32", "groups_ptr": "*i32", "found_ptr": "*i32", "bound_ptr": "*i32", "above_ptr": "*i32",
    "chosen_ptr": "*i64", "ids_ptr": "*i64", "ranks_ptr": "*i64", "sums_ptr": "*i64", "uniform_ptr": "*fp64",
    "x_scales_ptr": "*fp32", "parts_ptr": "*fp32", "arrived_ptr": "*i32",
    "order_ptr": "*i32", "owner_ptr": "*i32", "counts_ptr": "*i32", "experts_ptr": "*i64", "gates_ptr": "*fp32",
    "logits_ptr": "*fp32", "rows_ptr": "*i64", "penalties_ptr": "*fp32",
}  # fmt: skip
CODES = {"k_ptr", "v_ptr", "keys_ptr", "values_ptr"}  # of a cache in 8 bits
TOKENS = {logit_groups.logit_groups_kernel, sample.sample_kernel, sample_wide.sample_wide_kernel}  # what they return
SCALARS = {"factor": "fp32", "cap_in": "fp32", "eps": "fp32", "offset": "fp32"}
E4M3, E4M3_HALVED = "*fp8e4nv", "*fp8e4b8"
ALIGNED = {"stride_x", "stride_page", "stride_slot", "source_side", "target_side"}


def side_of_product(name: str, constants: dict[str, Any], dtype: str) -> str:
    """The type of x or the weight of a product."""
    if constants["KIND"] == "both":
        return {tl.int8: "*i8", tl.float8e4b8: E4M3_HALVED}.get(constants["DOT"], E4M3)
    packed = {"int8": "*i8", "int4": "*u8"} if name == "weight_ptr" else {}
    return packed.get(constants["KIND"], f"*{dtype}")


def signature(kernel: Any, constants: dict[str, Any], dtype: str) -> tuple[dict[str, str], dict[tuple, list]]:
    """The types of a kernel's arguments, and which of them Triton may take for multiples of 16."""
    types: dict[str, str] = {}
    eight_bits = constants.get("EIGHT_BITS") or "FP8" in constants
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name == "table_ptr" and kernel is rotary.rotary_kernel:
            types[name] = "*fp32"
        elif name == "out_ptr" and kernel in TOKENS:
            types[name] = "*i64"
        elif name in CODES and eight_bits and (name in ("keys_ptr", "values_ptr")) == ("FP8" in constants):
            types[name] = "*i8"
        elif kernel is linear.linear_kernel and name in ("x_ptr", "weight_ptr"):
            types[name] = side_of_product(name, constants, dtype)
        elif kernel is quantize_rows.quantize_rows_kernel and name == "out_ptr":
            types[name] = E4M3_HALVED if constants["HALVED"] else E4M3 if constants["E4M3"] else "*i8"
        elif name in POINTERS:
            types[name] = POINTERS[name]
        elif name.endswith(("_ptr", "_out")):
            types[name] = f"*{dtype}"
        else:
            types[name] = SCALARS.get(name, "i32")
    aligned = [i for i, (name, kind) in enumerate(types.items()) if kind.startswith("*") or name in ALIGNED]
    return types, {(i,): [["tt.divisibility", 16]] for i in aligned}


def cases(arch: str) -> Iterator[tuple[str, Any, str, dict[str, Any], int, int]]:
    """(name, kernel, dtype, constants, warps, stages) of everything that the launchers can ask for by table."""
    if arch in ONLY_PRODUCTS:
        yield from product_cases(arch)
        return
    dots = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
    for dtype, dims in (("bf16", (64, 128, 256)), ("fp16", (128,)), ("fp32", (64, 128, 256))):
        for dim in dims:
            for decode in (False, True):
                extras = [(False, False, False, 16)]
                if dtype == "bf16" and dim == 128:
                    extras += [(True, True, True, 64)]
                for window, cap, sinks, page in extras:
                    tile = configs.attention(arch, 4 if dtype == "fp32" else 2, dim, decode, 4)
                    constants = attention_constants(
                        arch,
                        tile,
                        decode,
                        D=dim,
                        BLOCK_D=dim,
                        PAGE=page,
                        WINDOW=window,
                        CAP=cap,
                        SINKS=sinks,
                        DOT=dots[dtype],
                    )
                    name = f"{'decode' if decode else 'prefill'}-{dtype}-{dim}{'-window-cap-sinks' if window else ''}"
                    yield name, attention.attention_kernel, dtype, constants, tile.warps, tile.stages
    for dtype, dims in (("bf16", (64, 128, 256)), ("fp32", (128,))):
        for dim in dims:
            tile = configs.attention_of_any(arch, 4 if dtype == "fp32" else 2, dim, 4)
            for decode in (False, True):
                constants = attention_constants(
                    arch, tile, decode, D=dim, BLOCK_D=dim, PARTED=not decode, DOT=dots[dtype]
                )
                name = f"invariant-{dtype}-{dim}-{'decode' if decode else 'prefill'}"
                yield name, attention.attention_kernel, dtype, constants, tile.warps, tile.stages
    yield (
        "merge", attention_merge.attention_merge_kernel, "bf16",
        dict(HQ=32, GROUP=4, D=128, BLOCK_D=128, BLOCK_Q=1, SINKS=True, TILES=False), 2, 2,
    )  # fmt: skip
    for width in (128, 4096, 16384):
        rows, warps = configs.row_block(width)
        norm = dict(WIDTH=width, BLOCK_R=rows, BLOCK=width, RESIDUAL=True)
        yield f"rms-{width}", rms_norm.rms_norm_kernel, "bf16", norm, warps, 2
        yield f"layer-{width}", layer_norm.layer_norm_kernel, "bf16", {**norm, "BIAS": True}, warps, 2
    for interleaved, turned in ((False, 128), (True, 64)):
        constants = dict(
            HQ=32, HKV=8, D=128, R=turned, BLOCK_H=8, BLOCK_R=turned // 2, BLOCK_REST=max(1, 128 - turned),
            INTERLEAVED=interleaved,
        )  # fmt: skip
        yield f"rotary-{turned}", rotary.rotary_kernel, "bf16", constants, 2, 2
    for kind in gated_act.ACTIVATIONS.values():
        yield f"act-{kind}", gated_act.gated_act_kernel, "bf16", dict(WIDTH=14336, BLOCK=1024, KIND=kind), 4, 2
    yield from caches(arch)
    yield from product_cases(arch)
    yield from sampling()


def attention_constants(arch: str, tile: configs.Tile, decode: bool, group: int = 4, **more: Any) -> dict[str, Any]:
    """attention_kernel's, of 32 query heads with keys and values apart in 16 bits unless ``more`` says otherwise."""
    return dict(
        HQ=32, GROUP=group, REST=0, BLOCK_R=0, BLOCK_M=tile.rows, BLOCK_N=tile.keys,
        BLOCK_Q=1 if decode else max(1, tile.rows // group), WINDOW=False, CAP=False, SINKS=False, EIGHT_BITS=0,
        TILES=not decode, SPLIT=decode, PARTED=False, STAY=configs.stay(arch), DOT=tl.bfloat16,
    ) | dict(PAGE=16) | more  # fmt: skip


def caches(arch: str) -> Iterator[tuple[str, Any, str, dict[str, Any], int, int]]:
    """Caches in 8 bits, latent ones, and what writes and copies them."""
    for bits, dim, page in (("fp8", 64, 16), ("fp8", 128, 256), ("fp8", 256, 16), ("int8", 128, 16)):
        for decode in (False, True):
            tile = configs.attention(arch, 2, dim, decode, 4, eight_bits=True)
            constants = attention_constants(
                arch, tile, decode, D=dim, BLOCK_D=dim, EIGHT_BITS=2 if bits == "fp8" else 1, PAGE=page
            )
            name = f"{'decode' if decode else 'prefill'}-{bits}-{dim}"
            yield name, attention.attention_kernel, "bf16", constants, tile.warps, tile.stages
    tile = configs.attention_of_any(arch, 2, 128, 4, eight_bits=True)
    for decode in (False, True):
        constants = attention_constants(arch, tile, decode, D=128, BLOCK_D=128, EIGHT_BITS=2, PARTED=not decode)
        name = f"invariant-fp8-128-{'decode' if decode else 'prefill'}"
        yield name, attention.attention_kernel, "bf16", constants, tile.warps, tile.stages
    for heads, eight_bits, dtype, page in (
        (128, 0, "bf16", 64),
        (16, 0, "bf16", 16),
        (128, 2, "bf16", 64),
        (16, 0, "fp32", 16),
    ):
        for decode in (False, True):
            tile = configs.latent(arch, 4 if dtype == "fp32" else 2, decode, heads)
            constants = attention_constants(
                arch, tile, decode, heads, HQ=heads, D=512, BLOCK_D=512, REST=64, BLOCK_R=64, EIGHT_BITS=eight_bits, PAGE=page,
                DOT=tl.float32 if dtype == "fp32" else tl.bfloat16,
            )  # fmt: skip
            name = f"latent-{'decode' if decode else 'prefill'}-{'fp8' if eight_bits else dtype}-{heads}"
            yield name, attention.attention_kernel, dtype, constants, tile.warps, tile.stages
    tile = configs.latent(arch, 2, False, 128)
    for decode in (False, True):
        constants = attention_constants(
            arch, tile, decode, 128, HQ=128, D=512, BLOCK_D=512, REST=64, BLOCK_R=64, PAGE=64, PARTED=not decode
        )
        name = f"latent-invariant-{'decode' if decode else 'prefill'}-bf16-128"
        yield name, attention.attention_kernel, "bf16", constants, tile.warps, tile.stages
    write = dict(WIDTH=1024, BLOCK_T=1, BLOCK=1024, LATENT=False)
    yield "write", write_kv.write_kv_kernel, "bf16", write, 4, 2
    for fp8 in (False, True):
        write = dict(HKV=8, D=128, PAGE=16, BLOCK_R=8, BLOCK_D=128, FP8=fp8, LATENT=False)
        yield f"write-{'fp8' if fp8 else 'int8'}", write_kv.write_kv_eight_bits_kernel, "bf16", write, 4, 2
    write = dict(HKV=1, D=576, PAGE=64, BLOCK_R=1, BLOCK_D=1024, FP8=True, LATENT=True)
    yield "write-latent", write_kv.write_kv_eight_bits_kernel, "bf16", write, 4, 2
    yield "copy", copy_pages.copy_pages_kernel, "bf16", dict(PAGE=16384, BLOCK=4096), 8, 2


def sampling() -> Iterator[tuple[str, Any, str, dict[str, Any], int, int]]:
    """What draws tokens and tells their probabilities, of small and of the largest vocabularies."""
    group, block, most = logit_peaks.GROUP, logit_peaks.BLOCK, logit_peaks.MOST
    chunk = logit_peaks.CHUNK
    yield "peaks", logit_peaks.logit_peaks_kernel, "fp32", dict(GROUP=group, GROUPS=chunk // group), 4, 2
    for logprobs in (False, True):
        constants = dict(BLOCK=block, BLOCKS=chunk // block, LOGPROBS=logprobs)
        yield f"sums-{logprobs}", logit_sums.logit_sums_kernel, "fp32", constants, 4, 2
        for peaks in (1024, 8192):
            constants = dict(GROUP=group, BLOCK_P=peaks, MOST=most, GREEDY=False, CUT=True, LOGPROBS=logprobs)
            yield f"groups-{logprobs}-{peaks}", logit_groups.logit_groups_kernel, "fp32", constants, 8, 2
    greedy = dict(GROUP=group, BLOCK_P=8192, MOST=most, GREEDY=True, CUT=False, LOGPROBS=False)
    yield "groups-greedy", logit_groups.logit_groups_kernel, "fp32", greedy, 8, 2
    for cut in (False, True):
        constants = dict(GROUP=group, BLOCK=block, BLOCK_B=512, MOST=most, CUT=cut)
        yield f"sample-{cut}", sample.sample_kernel, "fp32", constants, 8, 2
    yield "penalize", penalize.penalize_kernel, "fp32", dict(BLOCK=penalize.BLOCK), 4, 2
    yield "sample-wide", sample_wide.sample_wide_kernel, "fp32", dict(BLOCK=2 * block), 8, 2
    for top, warps in ((0, 4), (32, 4), (256, 8)):
        constants = dict(GROUP=group, BLOCK_B=512, MOST=most, TOP=top)
        yield f"logprobs-{top}", logprobs_kernels.logprobs_kernel, "fp32", constants, warps, 2


def product_cases(arch: str) -> Iterator[tuple[str, Any, str, dict[str, Any], int, int]]:
    """Products of every kind of weight with few, some and many rows, with their sums cut and not, gated and by expert;
    then what goes before and after them."""
    dots = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
    halved = configs.e4m3(arch) == torch.float8_e4m3fnuz
    e4m3 = tl.float8e4b8 if halved else tl.float8e4nv
    kinds = [("dense", 0, "dense"), ("int8-128", 128, "int8"), ("int4-32", 32, "int4"), ("int4-128", 128, "int4")]
    kinds += [("w8a8", 0, "both")] + [("fp8", 0, "both")] * ("fp8" in configs.formats(arch))

    def case(name, kind, group, rows, dtype="bf16", **other):
        itemsize = 1 if kind == "both" else 4 if dtype == "fp32" else 2
        tile = configs.linear(arch, kind, itemsize, rows, group)
        k = 4096
        constants: dict[str, Any] = dict(
            N=4096, K=k, KIND=kind, GROUP=group, ZEROS=False, BIAS=True, ACT=-1, EXPERTS=False, CHOSEN=1,
            STEPS=k // tile.step // (2 if kind == "int4" else 1), PARTS=1, SPLIT=False, BLOCK_M=tile.rows,
            BLOCK_N=tile.columns, BLOCK_K=tile.step, STAGES=tile.stages, DOT=dots[dtype], PTX=arch.startswith("sm_"),
        )  # fmt: skip
        if kind == "both":
            constants["DOT"] = tl.int8 if "w8a8" in name else e4m3
        return name, linear.linear_kernel, dtype, constants | other, tile.warps, tile.stages

    for name, group, kind in kinds:
        yield case(f"product-{name}-few", kind, group, 16, PARTS=4, SPLIT=True)
        yield case(f"product-{name}-some", kind, group, None, PARTS=4, SPLIT=True)
        yield case(f"product-{name}-some-one-by-one", kind, group, None, PARTS=4)
        yield case(f"product-{name}-many", kind, group, 4096)
        yield case(f"product-{name}-gated-few", kind, group, 16, ACT=0)
        yield case(f"product-{name}-gated-many", kind, group, 4096, ACT=0)
        yield case(f"product-{name}-experts-few", kind, group, 16, ACT=0, EXPERTS=True, CHOSEN=8)
        yield case(f"product-{name}-experts-some", kind, group, None, EXPERTS=True)
    for kind, group in (("dense", 0), ("int8", 128), ("int4", 32)):
        yield case(f"product-{kind}-fp32", kind, group, 16, "fp32")
        yield case(f"product-{kind}-fp16-few", kind, group, 16, "fp16")
    yield case("product-int4-128-zeros-few", "int4", 128, 16, ZEROS=True)
    yield case("product-int4-128-zeros-fp16-many", "int4", 128, 4096, "fp16", ZEROS=True)
    for width in (4096, 28672):
        block, warps = triton.next_power_of_2(width), configs.row_block(width)[1]
        for act in (-1, 0):
            constants = dict(WIDTH=width, ACT=act, E4M3=False, HALVED=False, BLOCK=block)
            yield f"quantize-int8-{width}", quantize_rows.quantize_rows_kernel, "bf16", constants, warps, 2
        if "fp8" in configs.formats(arch):
            constants = dict(WIDTH=width, ACT=0, E4M3=True, HALVED=halved, BLOCK=block)
            yield f"quantize-e4m3-{width}", quantize_rows.quantize_rows_kernel, "bf16", constants, warps, 2
    yield "count", moe.count_kernel, "bf16", dict(BLOCK=1024), 4, 2
    yield "sort", moe.sort_kernel, "bf16", dict(EXPERTS=128, BLOCK_E=128, ROWS=64, BLOCK=1024), 4, 2
    yield "weigh", moe.weigh_kernel, "bf16", dict(CHOSEN=8, WIDTH=4096, BLOCK=1024), 4, 2
    yield (
        "route", route.route_kernel, "bf16",
        dict(EXPERTS=256, CHOSEN=8, BLOCK=256, BLOCK_K=8, SCORE=1, BIAS=True, NORMALIZE=True), 1, 2,
    )  # fmt: skip


def ptxas(ptx: str, capability: int) -> tuple[int, int]:
    """(bytes of spills, registers) that ptxas reports."""
    suffix = "a" if capability >= 90 else ""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [
            get_ptxas(capability).path,
            "-v",
            f"--gpu-name=sm_{capability}{suffix}",
            file.name,
            "-o",
            "/dev/null",
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    if "Used" not in said:
        raise RuntimeError(said)
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", said))
    return spills, int(re.search(r"Used (\d+) registers", said)[1])


def compile_one(arch: str, case: tuple[str, Any, str, dict[str, Any], int, int]) -> dict[str, Any]:
    name, kernel, dtype, constants, warps, stages = case
    target = TARGETS[arch]
    types, attributes = signature(kernel, constants, dtype)
    source = ASTSource(kernel, types, constants, attributes)
    built = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    if target.backend == "cuda":
        text = built.asm["ptx"]
        spills, registers = ptxas(text, target.arch)
    else:
        text = built.asm["amdgcn"]
        spills = 4 * sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s*(\d+)", text))
        registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s*(\d+)", text))
    print(arch, name, built.metadata.shared, spills, registers, file=sys.stderr, flush=True)
    return {
        "kernel": kernel.__name__, "name": name, "shared": built.metadata.shared, "spills": spills,
        "registers": registers, "matrix": sorted(set(re.findall(MATRIX, text))), "rows": constants.get("BLOCK_M"),
    }  # fmt: skip


if __name__ == "__main__":
    only = sys.argv[2] if len(sys.argv) > 2 else ""
    print(json.dumps([compile_one(sys.argv[1], case) for case in cases(sys.argv[1]) if re.match(only, case[0])]))
