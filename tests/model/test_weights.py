"""Checkpoints on disk: what is loaded, what is refused and by which name, and what MODEL may be."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quire.errors import ModelError
from quire.models.family import Part, WeightMap
from quire.models.llama import Llama
from quire.quantization import FORMATS
from quire.reference.quantize import rounded
from quire.weights.checkpoint import Checkpoint, weight_bytes
from quire.weights.load import DUMMY_BLOCK, dummy_tensor, load_weights
from quire.weights.resolve import resolve_model
from tests.model.model_helpers import Host

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
Q = "model.layers.1.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"
ROOT = Path(__file__).parents[2]


def tensors(config=CONFIG):
    generator = torch.Generator().manual_seed(0)
    parts = [part for weight in Llama().weights(config) for part in weight.parts]
    return {part.name: torch.randn(part.shape, generator=generator) for part in parts}


def put(folder, content, file="model.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file(content, folder / file)
    return folder


def read(folder, config=CONFIG, dtype="float32", backend=None, **options):
    family = Llama()
    return load_weights(folder, family.weights(config), family.spec(config), backend or Host(), dtype, 64, **options)


def shard(folder, content, **index):
    """Two shards and their index."""
    names = sorted(content)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in halves.items():
        put(folder, {name: content[name] for name in held}, file)
    weight_map = {name: file for file, held in halves.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | index}))
    return folder


def refused(folder, *said, **options):
    with pytest.raises(ModelError) as caught:
        read(folder, **options)
    for text in said:
        assert text in str(caught.value)


def test_fused_weights_are_the_parts_in_order(tmp_path):
    stored = tensors()
    weights = read(put(tmp_path, stored))
    layer = "model.layers.1."
    qkv = [stored[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(weights.layers[1].attention.qkv, torch.cat(qkv))
    gate_up = [stored[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(weights.layers[1].mlp.gate_up, torch.cat(gate_up))
    assert torch.equal(weights.head, stored["lm_head.weight"])
    assert weights.layers[0].attention.cos_sin is weights.layers[1].attention.cos_sin
    assert weights.layers[0].attention.qkv_bias is None


@pytest.mark.parametrize("stored_as", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_stored_dtype_becomes_the_wanted_one(stored_as, tmp_path):
    stored = {name: tensor.to(stored_as) for name, tensor in tensors().items()}
    weights = read(shard(tmp_path, stored), dtype="bfloat16")
    assert torch.equal(weights.layers[1].attention.out, stored["model.layers.1.self_attn.o_proj.weight"].bfloat16())
    assert weights.norm.dtype == torch.bfloat16
    assert weights.layers[0].attention.cos_sin.dtype == torch.float32


def test_each_weight_is_packed_once_and_nothing_else_is_kept(tmp_path):
    shapes, packed = [], []

    class Counting(Host):
        def pack_weight(self, raw, format="dense"):
            shapes.append(tuple(raw["weight"].shape))
            packed.append(super().pack_weight(raw, format))
            return packed[-1]

    weights = read(put(tmp_path, tensors()), backend=Counting())
    assert shapes == [w.shape for w in Llama().weights(CONFIG) if w.kind == "matrix"]
    assert weights.head is packed[-1]
    tied = {**CONFIG, "tie_word_embeddings": True}
    weights = read(tmp_path, config=tied)
    assert weights.head.data_ptr() == weights.embedding.data_ptr()


def test_matrices_are_rounded_while_loading_and_the_head_to_its_own_format(tmp_path):
    asked = []

    class Asked(Host):
        def pack_weight(self, raw, format="dense"):
            asked.append(format)
            return super().pack_weight(raw, format)

    put(tmp_path, tensors())
    for quantization, head in (("int8", "int8"), ("int4-128", "int4"), ("w8a8", "int8")):
        read(tmp_path, backend=Asked(), quantization=quantization)
        assert asked[-9:] == [quantization] * 8 + [head]
    weights = read(tmp_path, backend=Asked(), quantization="int4")
    raw = tensors()["model.layers.1.self_attn.o_proj.weight"]
    assert torch.equal(weights.layers[1].attention.out, rounded(raw, FORMATS["int4"]))
    assert not torch.equal(weights.layers[1].attention.out, raw)
    tied = read(tmp_path, config={**CONFIG, "tie_word_embeddings": True}, backend=Asked(), quantization="int4-64")
    assert asked[-9:] == ["int4"] + ["int4-64"] * 8
    assert torch.equal(tied.embedding, tensors()["model.embed_tokens.weight"])
    assert torch.equal(tied.head, rounded(tied.embedding, FORMATS["int4"]))


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_a_device_that_looks_rows_up_in_what_it_packed_holds_a_tied_table_once(tmp_path, quantization):
    tied, kept = {**CONFIG, "tie_word_embeddings": True}, []

    class Once(Host):
        capabilities = replace(Host.capabilities, embed_formats=frozenset({"dense", "int4"}))

    class Twice(Host):
        capabilities = replace(Host.capabilities, embed_formats=frozenset())

        def pack_weight(self, raw, format="dense"):
            return super().pack_weight(raw, format).clone()

    put(tmp_path, tensors())
    for backend in (Once(), Twice()):
        weights = read(tmp_path, config=tied, backend=backend, quantization=quantization)
        formats = backend.capabilities.embed_formats
        kept.append(weight_bytes(Llama().weights(tied), "float32", quantization, True, formats))
        assert (weights.embedding is weights.head) == bool(formats)
    assert kept[1] - kept[0] == 50 * 16 * 4


def test_a_checkpoint_that_is_overwritten_later_does_not_reach_the_model(tmp_path):
    weights = read(put(tmp_path, tensors()))
    before = weights.layers[0].attention.out.clone()
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert torch.equal(weights.layers[0].attention.out, before)


def test_missing_mis_shaped_and_unexpected_tensors_are_named(tmp_path):
    stored = tensors()
    refused(put(tmp_path / "a", {n: t for n, t in stored.items() if n != Q}), f"lacks {Q} [16, 16]")
    refused(
        put(tmp_path / "b", stored | {Q: torch.zeros(8, 16)}),
        f"{Q} has the shape [8, 16], expected by config.json: [16, 16]",
    )
    bias = Q.replace("weight", "bias")
    refused(put(tmp_path / "c", stored | {bias: torch.zeros(16)}), f"no use for: {bias}")
    refused(put(tmp_path / "d", stored | {Q: torch.zeros(16, 16, dtype=torch.int8)}), f"{Q} is stored as I8")
    headless = {n: t for n, t in stored.items() if n != "lm_head.weight"}
    refused(put(tmp_path / "e", headless), "lacks lm_head.weight [50, 16]; should config.json say tie_word_embeddings?")
    six = {f"extra.{i}": torch.zeros(1) for i in range(7)}
    refused(put(tmp_path / "f", stored | six), "extra.0, extra.1, extra.2, extra.3, extra.4 and 2 more")


def test_harmless_tensors_are_passed_over(tmp_path):
    inverse = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(2) for i in range(2)}
    read(put(tmp_path, tensors() | inverse))
    tied = {**CONFIG, "tie_word_embeddings": True}
    weights = read(tmp_path, config=tied)  # the head that is stored all the same is not used
    assert torch.equal(weights.head, tensors()["model.embed_tokens.weight"])


def test_damaged_files_are_named(tmp_path):
    file = put(tmp_path, tensors()) / "model.safetensors"
    whole = file.read_bytes()
    for content, said in (
        (b"", "damaged or cut short"),
        (whole[:100], "damaged or cut short"),
        (whole[:-4], "was the download complete?"),
        (b"\xff" * 64, "damaged or cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n", "git lfs pull"),
        ((5).to_bytes(8, "little") + b"[1,2]", "no readable header"),
        ((2).to_bytes(8, "little") + b'{"', "no readable header"),
        ((19).to_bytes(8, "little") + b'{"x": {"dtype": 1}}', "no readable header"),
    ):
        file.write_bytes(content)
        refused(tmp_path, "model.safetensors", said)


def test_an_index_cannot_lead_out_of_the_folder(tmp_path):
    outside = put(tmp_path / "outside", {Q: torch.zeros(16, 16)}, "x.safetensors")
    for name in ("../outside/x.safetensors", str(outside / "x.safetensors"), "a\\x.safetensors", "x.bin", 7, ["x"]):
        refused(shard(tmp_path / "in", tensors(), **{Q: name}), INDEX)


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path):
    refused(shard(tmp_path / "a", tensors(), **{Q: "c.safetensors"}), "names c.safetensors, which is not in")
    refused(shard(tmp_path / "b", tensors(), nowhere="a.safetensors"), "promises nowhere in a.safetensors")
    (shard(tmp_path / "c", tensors()) / INDEX).write_text("{}")
    refused(tmp_path / "c", "has no readable weight_map")


def test_what_counts_as_the_checkpoint_in_a_folder(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    refused(tmp_path, "only pickled weights (pytorch_model.bin)", "convert them to safetensors")
    (tmp_path / "pytorch_model.bin").unlink()
    refused(tmp_path, "has no *.safetensors")
    put(tmp_path, tensors(), "consolidated.safetensors")  # Mistral's own layout, beside the one that is read
    put(tmp_path, tensors(), "weights.safetensors")
    read(tmp_path)
    put(tmp_path, {Q: torch.zeros(16, 16)}, "more.safetensors")
    refused(tmp_path, f"tensor {Q} is in both more.safetensors and weights.safetensors")


def test_bytes_by_arithmetic_are_the_bytes_there_are(tmp_path):
    maps = Llama().weights(CONFIG)
    held = sum(tensor.nbytes for tensor in tensors().values())
    assert weight_bytes(maps, "float32") == Checkpoint(put(tmp_path, tensors())).bytes("float32") == held
    assert weight_bytes(maps, "bfloat16") == held // 2


def test_dummy_weights_depend_on_seed_and_name_alone():
    def drawn(seed, config=CONFIG):
        return read(None, config=config, load_format="dummy", seed=seed)

    one, same, other = drawn(1), drawn(1), drawn(2)
    assert torch.equal(one.layers[1].mlp.gate_up, same.layers[1].mlp.gate_up)
    assert torch.equal(one.layers[1].mlp.gate_up, drawn(1, {**CONFIG, "num_hidden_layers": 3}).layers[1].mlp.gate_up)
    assert not torch.equal(one.layers[1].mlp.gate_up, other.layers[1].mlp.gate_up)
    assert not torch.equal(one.layers[0].mlp.down, one.layers[1].mlp.down)
    assert one.head.abs().max() < 0.04 < one.head.std() * 3
    assert (one.norm - 1).abs().max() < 0.04


def test_a_large_dummy_weight_repeats_its_block_on_the_device():
    def made(rows, device="cpu"):
        weight = WeightMap("mlp", "down", (Part("w", (rows, 1024)),), "matrix", 0)
        return dummy_tensor(weight, torch.bfloat16, 7, device)

    large = made(2050).flatten()  # two blocks and a rest
    block = large[:DUMMY_BLOCK]
    assert torch.equal(large[DUMMY_BLOCK : 2 * DUMMY_BLOCK], block)
    assert torch.equal(large[2 * DUMMY_BLOCK :], block[: 2050 * 1024 - 2 * DUMMY_BLOCK])
    assert 0.0195 < block.float().std() < 0.0205
    assert len({row.numpy().tobytes() for row in made(2050).view(torch.int16)}) == 2050  # no two rows alike
    assert made(4, "meta").device.type == "meta"


def test_load_format_must_be_known_and_have_what_it_needs():
    with pytest.raises(ModelError, match="load_format = 'pt': must be auto, safetensors or dummy"):
        read(None, load_format="pt")
    with pytest.raises(ModelError, match="load_format = 'auto' needs a folder"):
        read(None)


@pytest.mark.parametrize("progress", [True, False, None])
def test_progress_is_shown_when_asked_for_or_on_a_terminal(progress, tmp_path, capsys):
    read(put(tmp_path, tensors()), progress=progress)
    assert ("loading weights" in capsys.readouterr().err) is (progress is True)


def test_a_model_is_a_folder_or_a_registered_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    checkpoints = {"demo": lambda: str(tmp_path / "mine"), "broken": lambda: str(tmp_path / "gone")}
    assert resolve_model("mine").samefile(tmp_path / "mine")
    assert resolve_model("demo", checkpoints) == tmp_path / "mine"
    (tmp_path / "demo").mkdir()
    assert resolve_model("demo", checkpoints) == tmp_path / "mine"  # a folder without a checkpoint hides nothing
    (tmp_path / "demo" / "config.json").write_text("{}")
    assert resolve_model("demo", checkpoints).samefile(tmp_path / "demo")  # one with a checkpoint goes first
    (tmp_path / "file").touch()
    for model, said in (
        ("broken", "registered model 'broken' should be in"),
        ("file", "model 'file' is a file; give the folder"),
        (
            "./nowhere",
            "'./nowhere' is no folder here and no name on the hub (owner/name); registered names: broken, demo",
        ),
        ("a/b/c", "no folder here and no name on the hub"),
        ("", "model is empty"),
    ):
        with pytest.raises(ModelError) as caught:
            resolve_model(model, checkpoints)
        assert said in str(caught.value)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_hub_name_works_offline_when_cached(hub):
    snapshot = hub / "models--org--tiny" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = hub / "models--org--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    assert resolve_model("org/tiny") == snapshot
    with pytest.raises(ModelError, match="not in the hub's cache"):
        resolve_model("org/tiny", revision="v2")


def test_a_hub_name_that_is_not_cached_says_so_offline(hub):
    with pytest.raises(
        ModelError, match=r"'org/absent' is no folder here, is not in the hub's cache, and the hub cannot"
    ):
        resolve_model("org/absent")
    with pytest.raises(ModelError, match="no name on the hub"):
        resolve_model("org/--bad--")


LOADED = """
import re, sys
from pathlib import Path
from quire.models.llama import Llama
from quire.weights.load import load_weights
from tests.model.model_helpers import Host

class Elsewhere(Host):
    def pack_weight(self, arrays, format):
        return arrays["weight"].shape  # as a device that keeps its copy in memory of its own

def resident(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) >> 10

def load(folder, config):
    family = Llama()
    return load_weights(Path(folder), family.weights(config), family.spec(config), Elsewhere(), "bfloat16", 64)

load({small!r}, {small_config})  # pages of libraries that loading touches come in, as many as the system likes
before = resident("VmRSS")
weights = load({folder!r}, {config})
print(resident("VmRSS") - before, resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_leaves_no_memory_behind(tmp_path):
    """malloc would keep what each matrix leaves, between the norms that stay; the file's pages would count, too."""
    config = CONFIG | {"hidden_size": 512, "intermediate_size": 8192, "num_hidden_layers": 8}
    folders = {}
    for name, each in {"small": CONFIG, "large": config}.items():
        parts = [part for weight in Llama().weights(each) for part in weight.parts]
        folders[name] = tmp_path / name
        folders[name].mkdir()
        put(folders[name], {part.name: torch.zeros(part.shape, dtype=torch.bfloat16) for part in parts})
    script = LOADED.format(
        config=config, folder=str(folders["large"]), small=str(folders["small"]), small_config=CONFIG
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    after, peak = map(int, done.stdout.split())  # MiB; a gate and up weight has 16, a layer 26, the model 208
    assert after < 16
    assert peak < 64
