"""Write a Llama or Qwen2 checkpoint as a GGUF file for llama.cpp: to_gguf.py CHECKPOINT OUT.gguf [bf16|q8_0|q4_0]

Only what the benchmark's checkpoints need: one architecture, no rotary scaling, a byte-level BPE. Matrices are
stored in the given type, norms and biases in float32; a tied embedding is stored once, as llama.cpp's own converter
does. Needs the packages gguf, numpy, safetensors and torch. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import argparse
import json
from pathlib import Path

import gguf
import torch
from safetensors import safe_open

TYPES = {
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
ARCHITECTURES = {"LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA, "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2}


def write_shape(writer: gguf.GGUFWriter, config: dict, file_type: gguf.LlamaFileType) -> None:
    """The hyperparameters under llama.cpp's names."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(file_type)


def write_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """The byte-level BPE; ids that the tokenizer does not have are filled with unused tokens."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["id"] for token in model["added_tokens"]}
    names = {index: name for name, index in model["model"]["vocab"].items()}
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names.get(index, f"[PAD{index}]") for index in range(vocab_size)])
    writer.add_token_types(
        [kinds.CONTROL if i in special else kinds.NORMAL if i in names else kinds.UNUSED for i in range(vocab_size)]
    )
    merges = model["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def pairs_apart(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from halves (Hugging Face) to alternating pairs (llama.cpp's Llama)."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("type", nargs="?", default="bf16", choices=sorted(TYPES))
    args = parser.parse_args()
    config = json.loads((args.checkpoint / "config.json").read_text(encoding="utf-8"))
    (name,) = config["architectures"]
    if name not in ARCHITECTURES:
        raise SystemExit(f"{name}: this script writes {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    stored, file_type = TYPES[args.type]
    writer = gguf.GGUFWriter(args.out, gguf.MODEL_ARCH_NAMES[architecture])
    write_shape(writer, config, file_type)
    write_tokenizer(writer, args.checkpoint, config["vocab_size"])
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for path in sorted(args.checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a dict)
                weight = tensors.get_tensor(key).float()
                if architecture is gguf.MODEL_ARCH.LLAMA and ".q_proj." in key:
                    weight = pairs_apart(weight, config["num_attention_heads"])
                if architecture is gguf.MODEL_ARCH.LLAMA and ".k_proj." in key:
                    weight = pairs_apart(weight, config["num_key_value_heads"])
                kind = stored if weight.dim() == 2 else gguf.GGMLQuantizationType.F32
                data = gguf.quants.quantize(weight.numpy(), kind)
                writer.add_tensor(names.get_name(key, (".weight", ".bias")), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


if __name__ == "__main__":
    main()
