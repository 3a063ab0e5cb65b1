"""Names and parameters of other libraries' operations as their releases have them: what our calls are held to.

Read from the sources of the releases named here, by parsing. ``test_choice.py`` compares the list again with whatever
of them is installed (or on the path, as an unpacked wheel), and binds every call that the plugins make to it.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Release:
    """``calls``: {(file below the package, class or "", function): its parameters as in a def, without annotations;
    those that have a default end in "="}."""

    package: str
    version: str
    dated: str  # of the files in the wheel
    calls: dict[tuple[str, str, str], str]


FLASHINFER = Release(
    "flashinfer", "0.7.2.post1", "2026-10-23",
    {
        ("decode.py", "BatchDecodeWithPagedKVCacheWrapper", "__init__"):
            "self, float_workspace_buffer, kv_layout=, use_cuda_graph=, use_tensor_cores=, "
            "paged_kv_indptr_buffer=, paged_kv_indices_buffer=, paged_kv_last_page_len_buffer=, backend=, "
            "jit_args=",
        # plan() hands its keyword arguments on to this one.
        ("decode.py", "BatchDecodeWithPagedKVCacheWrapper", "_plan_impl"):
            "self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *, "
            "pos_encoding_mode=, window_left=, window_right=, logits_soft_cap=, q_data_type=, "
            "kv_data_type=, o_data_type=, data_type=, sm_scale=, rope_scale=, rope_theta=, non_blocking=, "
            "block_tables=, seq_lens=, fixed_split_size=, disable_split_kv=, q_len_per_req=, is_causal=",
        ("decode.py", "BatchDecodeWithPagedKVCacheWrapper", "run"):
            "self, q, paged_kv_cache, *args, q_scale=, k_scale=, v_scale=, out=, lse=, return_lse=, "
            "enable_pdl=, window_left=, sinks=, q_len_per_req=, skip_softmax_threshold_scale_factor=, "
            "kv_cache_sf=",
        ("prefill.py", "BatchPrefillWithPagedKVCacheWrapper", "__init__"):
            "self, float_workspace_buffer, kv_layout=, use_cuda_graph=, qo_indptr_buf=, "
            "paged_kv_indptr_buf=, paged_kv_indices_buf=, paged_kv_last_page_len_buf=, custom_mask_buf=, "
            "mask_indptr_buf=, backend=, jit_args=, jit_kwargs=, variant_owns_mask=",
        ("prefill.py", "BatchPrefillWithPagedKVCacheWrapper", "plan"):
            "self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, "
            "num_kv_heads, head_dim_qk, page_size, head_dim_vo=, custom_mask=, packed_custom_mask=, "
            "causal=, pos_encoding_mode=, use_fp16_qk_reduction=, sm_scale=, window_left=, "
            "logits_soft_cap=, rope_scale=, rope_theta=, q_data_type=, kv_data_type=, o_data_type=, "
            "non_blocking=, prefix_len_ptr=, token_pos_in_items_ptr=, token_pos_in_items_len=, "
            "max_item_len_ptr=, seq_lens=, seq_lens_q=, block_tables=, max_token_per_sequence=, "
            "max_sequence_kv=, fixed_split_size=, disable_split_kv=, uniform_q_len=",
        ("prefill.py", "BatchPrefillWithPagedKVCacheWrapper", "run"):
            "self, q, paged_kv_cache, *args, q_scale=, k_scale=, v_scale=, out=, lse=, return_lse=, "
            "lse_base=, lse_layout=, enable_pdl=, window_left=, sinks=, kv_cache_sf=, "
            "skip_softmax_threshold_scale_factor=, use_fp16_softmax=, uses_spcompress=",
    },
)  # fmt: skip

IPEX = Release(
    "intel_extension_for_pytorch", "2.8.0", "2025-07-18",
    {
        ("llm/modules/mha_fusion.py", "PagedAttention", "reshape_and_cache_flash"):
            "cls, key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype=, k_scale=, v_scale=",
        ("llm/modules/mha_fusion.py", "PagedAttention", "flash_attn_varlen_func"):
            "cls, output, query, key_cache, value_cache, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, "
            "max_seqlen_kv, scale, is_cusal, block_tables, alibi_slopes, window_size_left=, "
            "window_size_right=, kv_cache_dtype=, k_scale=, v_scale=, softcap=",
        ("llm/functional/fusions.py", "", "rms_norm"):
            "hidden_states, weight, eps",
        ("llm/functional/fusions.py", "", "silu_mul"):
            "x, y, out=",
        ("llm/functional/fusions.py", "", "gelu_mul"):
            "x, y, out=, approximate=",
    },
)  # fmt: skip

VARLEN = {
    (2, 11): ("query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=, scale=, window_size="),
    (2, 13): (
        "query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=, scale=, window_size=, "
        "enable_gqa=, seqused_k=, block_table=, num_splits="
    ),
}
"""torch.nn.attention.varlen.varlen_attn, by torch's version."""


def in_source(folder: Path, release: Release) -> dict[tuple[str, str, str], str]:
    """The same list, read from a package's folder. The last definition counts: overloads come before it."""
    found = {}
    for file, owner, function in release.calls:
        body: list[ast.stmt] = ast.parse((folder / file).read_text()).body
        if owner:
            body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == owner)
        found[file, owner, function] = [
            parameters(node.args) for node in body if isinstance(node, ast.FunctionDef) and node.name == function
        ][-1]
    return found


def parameters(arguments: ast.arguments) -> str:
    """As written above: a name with a default ends in "="."""
    plain = [*arguments.posonlyargs, *arguments.args]
    first = len(plain) - len(arguments.defaults)
    names = [argument.arg + "=" * (place >= first) for place, argument in enumerate(plain)]
    if arguments.vararg is not None:
        names.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        names.append("*")
    defaults = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    names += [argument.arg + "=" * (default is not None) for argument, default in defaults]
    return ", ".join([*names, *([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])])


def signature(text: str) -> inspect.Signature:
    """A parameter list as a signature to bind calls to."""
    kinds, star = [], False
    for name in text.split(", "):
        if name.startswith("*"):
            star = True
            if len(name) > 1:
                kinds.append(inspect.Parameter(name[1:], inspect.Parameter.VAR_POSITIONAL))
            continue
        kind = inspect.Parameter.KEYWORD_ONLY if star else inspect.Parameter.POSITIONAL_OR_KEYWORD
        default = None if name.endswith("=") else inspect.Parameter.empty
        kinds.append(inspect.Parameter(name.removesuffix("="), kind, default=default))
    return inspect.Signature(kinds)


def bound(text: str, *args: object, **kwargs: object) -> dict[str, object]:
    """A call's arguments by name; TypeError where the release would not take them."""
    return dict(signature(text).bind(*args, **kwargs).arguments)
