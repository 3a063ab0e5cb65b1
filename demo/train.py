"""Train the demo model from scratch on generated conversations, within a budget of wall-clock minutes.

    python demo/tokenizer.py --output checkpoint
    torchrun --nproc-per-node 2 demo/train.py --output checkpoint --minutes 60

Every process takes one core: several processes of one thread are faster than one process of several threads for a
model as small as this. `python demo/train.py` works as well.

The learning rate warms up, stays constant and falls to zero at the end of the budget. Matrices are trained by Muon,
the embedding and the norms by Adam. The model computes in bfloat16, with float32 master copies of its weights. Every
few minutes the weights are saved atomically in the Hugging Face layout, and the state for `--resume` beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from generate import MIXTURE, Generator
from tokenizer import END, PAD, START, render

IGNORED = -100
MAX_LENGTH = 1024


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """The shape of the model: about 5.5 million parameters."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=6,
        intermediate_size=768,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )


def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The tensor added up over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class Batches:
    """Turns the stream of examples into batches of token ids and targets."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stream: Generator, tokens: int) -> None:
        self.tokenizer = tokenizer
        self.examples = stream.stream()
        self.tokens = tokens
        ids = tokenizer.convert_tokens_to_ids
        self.pad, self.start, self.end = ids(PAD), ids(START), ids(END)
        self.assistant = tokenizer.encode("assistant\n", add_special_tokens=False)
        self.think = tokenizer.encode("<think>\n", add_special_tokens=False)
        self.queue: list[tuple[list[int], list[int]]] = []

    def targets(self, ids: list[int], plain: bool) -> list[int]:
        """Next-token targets: everything in plain text, else only what the assistant says."""
        wanted = list(ids) if plain else [IGNORED] * len(ids)
        opening = [self.start, *self.assistant]
        position = 0
        while not plain and position < len(ids):
            if ids[position : position + len(opening)] != opening:
                position += 1
                continue
            position += len(opening)
            if ids[position : position + len(self.think)] == self.think:
                position += len(self.think)  # part of the prompt
            stop = ids.index(self.end, position) + 1
            wanted[position:stop] = ids[position:stop]
            position = stop
        return wanted[1:] + [IGNORED]

    def fill(self) -> None:
        """Encode some examples more."""
        examples = list(islice(self.examples, 512))
        texts = [render(example, self.tokenizer) for example in examples]
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        for example, ids in zip(examples, encoded, strict=True):
            if len(ids) <= MAX_LENGTH:
                self.queue.append((ids, self.targets(ids, example.text is not None)))

    def step(self) -> list[tuple[Tensor, Tensor]]:
        """The micro-batches of one step, each of examples of similar length to waste little on padding."""
        rows, count = [], 0
        while count < self.tokens:
            if not self.queue:
                self.fill()
            rows.append(self.queue.pop())
            count += len(rows[-1][0])
        rows.sort(key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in rows:
            if groups[-1] and len(row[0]) > 1.25 * len(groups[-1][0][0]) + 4:
                groups.append([])
            groups[-1].append(row)
        return [self.pad_rows(group) for group in groups]

    def pad_rows(self, rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        """Rows as rectangular tensors; attention is causal, so padding on the right needs no mask."""
        length = len(rows[-1][0])
        ids = torch.tensor([ids + [self.pad] * (length - len(ids)) for ids, _ in rows])
        targets = torch.tensor([wanted + [IGNORED] * (length - len(wanted)) for _, wanted in rows])
        return ids, targets


def orthogonalize(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration of Muon: the nearest semi-orthogonal matrices, for a batch of equal shape."""
    x = matrices.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


@dataclass
class Rates:
    """Learning rates at full height."""

    muon: float = 0.02
    adam: float = 4e-3
    decay: float = 0.01


class Optimizer:
    """Muon for the matrices of the layers and Adam for the rest, on float32 masters of bfloat16 weights."""

    def __init__(self, model: Qwen3ForCausalLM, rates: Rates) -> None:
        self.rates = rates
        self.params = dict(model.named_parameters())
        self.masters = {name: param.detach().float().clone() for name, param in self.params.items()}
        self.first = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        self.matrices: dict[torch.Size, list[str]] = {}
        for name, param in self.params.items():
            if param.ndim == 2 and "embed" not in name:
                self.matrices.setdefault(param.shape, []).append(name)
        in_muon = {name for names in self.matrices.values() for name in names}
        self.others = [name for name in self.params if name not in in_muon]
        self.second = {name: torch.zeros_like(self.masters[name]) for name in self.others}
        self.steps = 0

    @torch.no_grad()
    def step(self, scale: float) -> float:
        """Update the weights at `scale` of the full rates and return the norm of the gradient."""
        self.steps += 1
        rank, world = rank_and_world()
        flat = torch.cat([param.grad.float().flatten() for param in self.params.values() if param.grad is not None])
        sizes = [param.numel() for param in self.params.values()]
        pieces = sum_over_processes(flat).split(sizes)
        grads = {name: piece.view_as(self.params[name]) for name, piece in zip(self.params, pieces, strict=True)}
        norm = float(flat.norm())
        clip = min(1.0, 1.0 / (norm + 1e-6))
        for shape, names in self.matrices.items():
            for name in names:
                self.first[name].lerp_(grads[name], 0.05)
            mixed = torch.stack([grads[name].lerp(self.first[name], 0.95) for name in names])
            rate = scale * self.rates.muon * max(1.0, shape[0] / shape[1]) ** 0.5
            updates = torch.zeros_like(mixed)
            updates[rank::world] = orthogonalize(mixed[rank::world])  # the processes share the work
            for name, update in zip(names, sum_over_processes(updates), strict=True):
                self.masters[name].mul_(1 - rate * self.rates.decay).sub_(update, alpha=rate)
        for name in self.others:
            grad = grads[name] * clip
            self.first[name].lerp_(grad, 0.1)
            self.second[name].lerp_(grad.square(), 0.05)
            mean = self.first[name] / (1 - 0.9**self.steps)
            spread = (self.second[name] / (1 - 0.95**self.steps)).sqrt() + 1e-8
            self.masters[name].sub_(mean / spread, alpha=scale * self.rates.adam)
        for name, param in self.params.items():
            param.copy_(self.masters[name])
            param.grad = None
        return norm

    def state(self) -> dict[str, object]:
        """All that `load` needs."""
        return {"masters": self.masters, "first": self.first, "second": self.second, "steps": self.steps}

    @torch.no_grad()
    def load(self, state: dict) -> None:
        """Continue from a saved state."""
        self.masters, self.first, self.second = state["masters"], state["first"], state["second"]
        self.steps = state["steps"]
        for name, param in self.params.items():
            param.copy_(self.masters[name])


def schedule(fraction: float, warmup: float = 0.01, decay: float = 0.4) -> float:
    """The height of the learning rate after a fraction of the budget: linear up, constant, linear down."""
    return max(0.0, min(1.0, (fraction + 1e-3) / warmup, (1 - fraction) / decay))


def save(model: Qwen3ForCausalLM, optimizer: Optimizer, output: Path, state_path: Path, progress: dict) -> None:
    """Save the model and the state so that a reader never sees half a file."""
    staging = output / ".staging"
    model.save_pretrained(staging)
    before = progress["before"]  # of the weights that were there
    summary = {
        "parameters": model.num_parameters(),
        "steps": before.get("steps", 0) + progress["step"],
        "tokens": before.get("tokens", 0) + progress["tokens"],
        "minutes": round(before.get("minutes", 0) + progress["seconds"] / 60, 1),
    }
    (staging / "training.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    for path in staging.iterdir():
        path.chmod(0o644)
        os.replace(path, output / path.name)
    staging.rmdir()
    state_path.parent.mkdir(parents=True, exist_ok=True)
    partial = state_path.with_suffix(".part")
    torch.save({"optimizer": optimizer.state(), **progress}, partial)
    os.replace(partial, state_path)


def losses(model: Qwen3ForCausalLM, batches: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, int]]:
    """The summed loss and the number of targets of each micro-batch; only targets go through the output layer."""
    for ids, targets in batches:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        wanted = targets != IGNORED
        logits = model.lm_head(hidden[wanted]).float()
        yield cross_entropy(logits, targets[wanted], reduction="sum"), int(wanted.sum())


def train(args: argparse.Namespace) -> None:
    """Train until the budget is spent."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank, world = rank_and_world()
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    config = make_config(tokenizer)
    config._attn_implementation = "eager"  # for rows this short faster on a CPU than the fused kernel
    model = Qwen3ForCausalLM(config).bfloat16()
    if args.further:
        model.load_state_dict(load_file(args.output / "model.safetensors"), strict=False)  # the output layer is tied
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[model.config.eos_token_id, model.config.pad_token_id],
        pad_token_id=model.config.pad_token_id,
    )
    optimizer = Optimizer(model, Rates(muon=args.muon_rate, adam=args.adam_rate))
    known = args.output / "training.json"
    before = json.loads(known.read_text(encoding="utf-8")) if args.further and known.exists() else {}
    progress = {"seconds": 0.0, "step": 0, "tokens": 0, "before": before}
    if args.resume and args.state.exists():
        saved = torch.load(args.state)
        optimizer.load(saved["optimizer"])
        progress = {key: saved[key] for key in progress}
    seed = args.seed + 1000 * progress["step"] + rank
    pieces = sorted(token for token in tokenizer.get_vocab() if token.isalpha() and token.isascii())
    batches = Batches(tokenizer, Generator(seed, mixture=args.mixture, pieces=pieces), args.batch_tokens // world)
    if rank == 0:
        print(f"{model.num_parameters():,} parameters, from step {progress['step']}", flush=True)
    begin = time.monotonic() - progress["seconds"]
    saved_at = progress["seconds"]
    window = torch.zeros(3, dtype=torch.float64)  # loss, targets and tokens since the last line of the log
    while progress["seconds"] < args.minutes * 60:
        micro = batches.step()
        counts = torch.tensor(
            [0.0, sum(int((targets != IGNORED).sum()) for _, targets in micro), sum(ids.numel() for ids, _ in micro)],
            dtype=torch.float64,
        )
        total = sum_over_processes(counts.clone())
        for loss, _ in losses(model, micro):
            (loss / total[1]).backward()
            counts[0] += loss.item()
        height = schedule(progress["seconds"] / (args.minutes * 60))
        norm = optimizer.step(height)
        window += torch.cat([counts[:1] * world, total[1:]])
        clock = torch.tensor([time.monotonic() - begin if rank == 0 else 0.0], dtype=torch.float64)
        before, progress["seconds"] = progress["seconds"], float(sum_over_processes(clock))
        progress["step"] += 1
        progress["tokens"] += int(total[2])
        if rank != 0:
            continue
        if progress["step"] % args.log_every == 0:
            print(
                f"step {progress['step']} min {progress['seconds'] / 60:.1f} loss {window[0] / window[1]:.4f} "
                f"norm {norm:.2f} rate {height:.2f} tokens/s {total[2] / (progress['seconds'] - before):.0f} "
                f"tokens {progress['tokens'] / 1e6:.2f}M",
                flush=True,
            )
            window.zero_()
        if progress["seconds"] - saved_at > args.save_minutes * 60:
            saved_at = progress["seconds"]
            save(model, optimizer, args.output, args.state, progress)
    if rank == 0:
        save(model, optimizer, args.output, args.state, progress)
        print(f"done: {progress['step']} steps, {progress['tokens']:,} tokens, {progress['seconds'] / 60:.1f} min")


def parse_mixture(text: str) -> dict[str, float]:
    """The mixture with some shares changed, from `task=share,task=share`."""
    changes = dict(part.split("=") for part in text.split(",")) if text else {}
    if unknown := changes.keys() - MIXTURE.keys():
        raise argparse.ArgumentTypeError(f"unknown tasks: {sorted(unknown)}")
    return MIXTURE | {task: float(share) for task, share in changes.items()}


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder with the tokenizer, for the checkpoint")
    parser.add_argument("--state", type=Path, default=Path("demo-state.pt"), help="file for resuming")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--save-minutes", type=float, default=4.0)
    parser.add_argument("--batch-tokens", type=int, default=6144)
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--mixture", type=parse_mixture, default=MIXTURE, help="for example tools=20,stories=1")
    parser.add_argument("--further", action="store_true", help="start from the weights in the output folder")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted training from its state")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
