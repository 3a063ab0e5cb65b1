"""Write a checkpoint in the Hugging Face layout with random weights: make_checkpoint.py OUT KIND

micro    19M parameters, Llama
qwen05   494M, the shape of Qwen2 0.5B
llama1b  1.2B, the shape of Llama 3.2 1B

The tokenizer is a byte-level BPE of 32,000 entries trained on the Python standard library's sources, so nothing is
downloaded. Speed does not depend on what the weights are. Needs torch, transformers and tokenizers.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
CHAT_TEMPLATE = """\
{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""

SHAPES = {
    "micro": LlamaConfig(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, intermediate_size=704,
        vocab_size=32_000, max_position_embeddings=4096, **IDS,
    ),
    "qwen05": Qwen2Config(
        hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
        vocab_size=151_936, max_position_embeddings=40_960, tie_word_embeddings=True, **IDS,
    ),
    "llama1b": LlamaConfig(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192,
        head_dim=64, vocab_size=128_256, max_position_embeddings=40_960, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, **IDS,
    ),
}  # fmt: skip


def train_tokenizer() -> PreTrainedTokenizerFast:
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = sorted(str(path) for path in library.rglob("*.py") if "site-packages" not in path.parts)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=32_000, special_tokens=list(TOKENS.values()), initial_alphabet=alphabet)
    tokenizer.train(sources[:800], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **TOKENS)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("kind", choices=sorted(SHAPES))
    args = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES[args.kind], dtype=torch.bfloat16)
    model.save_pretrained(args.out)
    train_tokenizer().save_pretrained(args.out)
    print(f"{args.out}: {sum(weight.numel() for weight in model.parameters()) / 1e6:.0f}M parameters")


if __name__ == "__main__":
    main()
