"""From config.json to ModelSpec: what is read, what is refused and by which name. No torch is needed for any of it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from quire.errors import ModelError
from quire.models.config import read_config
from quire.models.family import find_family
from quire.plugins import load
from quire.spec import kv_spec
from quire.weights.checkpoint import weight_bytes

MODELS = load(only=()).models
BASE = {
    "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8,
    "max_position_embeddings": 2048,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}


def config(architecture="Llama", **changes):
    return {"architectures": [f"{architecture}ForCausalLM"], **BASE, **changes}


def spec(architecture="Llama", **changes):
    data = config(architecture, **changes)
    return find_family(MODELS, data).spec(data)


def names(architecture="Llama", **changes):
    data = config(architecture, **changes)
    return {part.name: part.shape for weight in find_family(MODELS, data).weights(data) for part in weight.parts}


def test_what_config_json_leaves_out_is_what_transformers_assumes():
    attention = spec().layers[0].attention
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.scale) == (8, 8, 8, 8**-0.5)
    assert (attention.kind, attention.window, attention.qk_norm) == ("full", None, None)
    assert (attention.rotary.theta, attention.rotary.scaling, attention.rotary.dim) == (10000.0, "none", 8)
    assert (spec().layers[0].mlp.activation, spec().norm.eps, spec().tied_embeddings) == ("silu", 1e-6, False)
    assert spec("Qwen3").layers[0].attention.head_dim == 128
    assert spec("Qwen3").layers[0].attention.qk_norm == spec("Qwen3").norm
    assert spec("Mistral").layers[0].attention.window == 4096
    assert spec("Llama", num_key_value_heads=None, head_dim=None) == spec()


def test_windows():
    def windows(*args, **changes):
        return [layer.attention.window for layer in spec(*args, **changes).layers]

    assert windows("Mistral", sliding_window=None) == [None] * 4
    assert windows("Mistral", sliding_window=32) == [32] * 4
    assert windows("Qwen2", sliding_window=32) == [None] * 4  # use_sliding_window is false
    assert windows("Qwen2", sliding_window=32, use_sliding_window=True, max_window_layers=3) == [None, None, None, 32]
    assert windows("Qwen3", use_sliding_window=True) == [None] * 4  # from layer 28 on
    kinds = ["sliding_attention", "full_attention"] * 2
    assert windows("Qwen3", use_sliding_window=True, sliding_window=8, layer_types=kinds) == [8, None, 8, None]
    assert [layer.attention.kind for layer in spec("Mistral", sliding_window=4).layers] == ["window"] * 4


def test_kv_groups():
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    mixed = spec("Qwen2", use_sliding_window=True, sliding_window=100, layer_types=kinds, num_key_value_heads=2)
    windowed, full = kv_spec(mixed, "bfloat16", 32).groups
    assert (windowed.layers, windowed.window) == ((0, 3), 100)
    assert (full.layers, full.window) == ((1, 2), None)
    assert (full.kv_heads, full.head_dim, full.dtype, full.page_size) == (2, 8, "bfloat16", 32)
    (only,) = kv_spec(mixed, "float32", max_model_len=100).groups  # a window that never passes anything
    assert (only.layers, only.window) == ((0, 1, 2, 3), None)
    assert len(kv_spec(mixed, "float32", max_model_len=101).groups) == 2


def test_tensor_names_and_shapes():
    plain = names(num_key_value_heads=2)
    assert plain["model.embed_tokens.weight"] == plain["lm_head.weight"] == (1000, 64)
    assert plain["model.layers.3.self_attn.k_proj.weight"] == (16, 64)
    assert plain["model.layers.0.mlp.down_proj.weight"] == (64, 128)
    assert not [name for name in plain if "bias" in name or "q_norm" in name]
    assert "lm_head.weight" not in names(tie_word_embeddings=True)
    biased = names(attention_bias=True, mlp_bias=True)
    assert len([name for name in biased if name.endswith("bias")]) == 4 * 7
    assert {n.split(".")[-2] for n in names("Qwen2") if n.endswith("bias")} == {"q_proj", "k_proj", "v_proj"}
    assert names("Qwen3", head_dim=16)["model.layers.0.self_attn.q_norm.weight"] == (16,)


def test_weight_bytes_is_the_published_size():
    qwen = config(
        "Qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    maps = find_family(MODELS, qwen).weights(qwen)
    assert weight_bytes(maps, "bfloat16") == 2 * 494_032_768  # Qwen2.5-0.5B, from its model card's file
    assert weight_bytes(maps, "float32") == 4 * 494_032_768
    # 24 layers of qkv (1152 x 896), out, gate and up, down; a head of the same bits beside the bfloat16 table of the embedding,
    # or in its place where the device looks rows up in it.
    body, table = 24 * (1152 * 896 + 896 * 896 + 3 * 4864 * 896), 151_936 * 896
    plain = 2 * (494_032_768 - body)
    assert weight_bytes(maps, "bfloat16", "int8", tied=True) == plain + (body + table) * 65 // 64
    assert weight_bytes(maps, "bfloat16", "int4", tied=True) == plain + (body + table) * 9 // 16
    once = plain - 2 * table + (body + table) * 9 // 16
    assert weight_bytes(maps, "bfloat16", "int4", True, {"int4"}) == once
    assert weight_bytes(maps, "bfloat16", None, True, {"dense"}) == 2 * 494_032_768
    assert weight_bytes(maps, "bfloat16", None, True, set()) == 2 * (494_032_768 + table)


def test_both_rotary_layouts_say_the_same():
    old = spec(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2})
    new = spec(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    assert old == new
    assert new.layers[0].attention.rotary.parameters == (("factor", 2.0),)
    # An override in the old layout (--hf-overrides) goes before what the checkpoint says in the new one.
    both = spec(
        rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rope_scaling={"type": "linear", "factor": 2}
    )
    assert both == new


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        ({"rope_type": "default"}, 2048),
        ({"rope_type": "linear", "factor": 2.5}, 5120),
        ({"rope_type": "dynamic", "factor": 2.0}, 4096),
        (YARN, 8192),
        ({**YARN, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 4.0}, 2048),
        ({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}, 2048),
    ],
)
def test_how_many_positions_a_scaling_is_good_for(scaling, positions):
    assert spec(rope_scaling=scaling).max_positions == positions


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
REFUSED = {
    "config.json of LlamaForCausalLM lacks hidden_size": {"hidden_size": None},
    "vocab_size = 0: must be an integer of at least 1": {"vocab_size": 0},
    "num_hidden_layers = True: must be an integer": {"num_hidden_layers": True},
    "num_hidden_layers = '4': must be an integer": {"num_hidden_layers": "4"},
    "num_key_value_heads = 3: must divide num_attention_heads = 8": {"num_key_value_heads": 3},
    "num_attention_heads = 7: must divide hidden_size = 64": {"num_attention_heads": 7},
    "hidden_act = 'relu': this activation is not supported (supported: silu,": {"hidden_act": "relu"},
    "rms_norm_eps = nan: must be a positive number": {"rms_norm_eps": float("nan")},
    "tie_word_embeddings = 'no': must be true or false": {"tie_word_embeddings": "no"},
    "eos_token_id = ['x']: must be an integer or a list": {"eos_token_id": ["x"]},
    "rope_theta = -1: must be a positive number": {"rope_theta": -1},
    "partial_rotary_factor = 2.0: 16 of 8 channels would turn": {"partial_rotary_factor": 2.0},
    "rope_type = 'mrope': this scaling is not supported (supported: default, linear, dynamic, llama3, yarn": {
        "rope_scaling": {"type": "mrope"}
    },
    "rope_scaling of type linear lacks factor": {"rope_scaling": {"type": "linear"}},
    "rope_scaling of type llama3 lacks low_freq_factor": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "rope_scaling.factor = '2': must be a positive number": {"rope_scaling": {"type": "linear", "factor": "2"}},
    "rope_scaling.high_freq_factor = 1.0: must be above low_freq_factor": {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}
    },
    "rope_scaling.long_factor = [2.0]: must be a list of 4 numbers": {"rope_scaling": {**LONG, "long_factor": [2.0]}},
    "rope_scaling = 'linear': must be an object": {"rope_scaling": "linear"},
    "one rotary embedding a kind of layer is not supported": {"rope_parameters": {"full_attention": {}}},
    "the quantization format 'gptq' is not supported": {"quantization_config": {"quant_method": "gptq"}},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_name_the_key_and_its_value(message):
    with pytest.raises(ModelError) as caught:
        spec(**REFUSED[message])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"]}, "must be a list of num_hidden_layers = 4 names"),
        ({"layer_types": ["chunked_attention"] * 4}, "'chunked_attention': supported are full_attention and"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding_window = None: layer_types has sliding_attention layers"),
        ({"use_sliding_window": True, "sliding_window": -5}, "sliding_window = -5: must be an integer of at least 1"),
    ],
)
def test_refusals_of_windows(changes, message):
    with pytest.raises(ModelError) as caught:
        spec("Qwen3", **changes)
    assert message in str(caught.value)


def test_an_unknown_architecture_is_refused_with_those_that_work():
    known = "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
    with pytest.raises(ModelError, match=f"architecture FooForCausalLM is not supported; supported are: {known}"):
        spec("Foo")
    for names in (None, [], "LlamaForCausalLM", [3]):
        with pytest.raises(ModelError, match="architectures = "):
            find_family(MODELS, {"architectures": names})
    data = {**config(), "architectures": ["Unheard", "LlamaForCausalLM"]}
    assert find_family(MODELS, data).spec(data) == spec()


def test_read_config(tmp_path):
    with pytest.raises(ModelError, match=r"has no config.json"):
        read_config(tmp_path)
    file = tmp_path / "config.json"
    for text, message in (
        ("[1]", "holds list, not a JSON object"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises(ModelError, match=message):
            read_config(tmp_path)
    file.write_text(json.dumps({"eos_token_id": 2, "vocab_size": 5, "rope_theta": 1.0}))
    assert read_config(tmp_path, {"vocab_size": 7}) == {"eos_token_id": 2, "vocab_size": 7, "rope_theta": 1.0}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 2]}))
    assert read_config(tmp_path)["eos_token_id"] == [2, 3]
    assert spec(eos_token_id=[2, 3]).eos_token_ids == (2, 3)
    assert spec(eos_token_id=None).eos_token_ids == ()


def test_no_torch_is_loaded_to_know_a_model():
    code = """
import sys
from quire.models.family import find_family
from quire.plugins import load
from quire.weights import checkpoint, resolve
config = CONFIG
for architecture in load(only=()).models:
    config["architectures"] = [architecture]
    family = find_family(load(only=()).models, config)
    assert checkpoint.weight_bytes(family.weights(config), "float32") > 0
sys.exit("torch" in sys.modules)
""".replace("CONFIG", repr(BASE))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
