"""What a weight format or KV cache dtype costs in quality: perplexity of held-out text, and the demo model's scores.

    python bench/perplexity.py --conversations 300 --json bench/results/perplexity.json

The text is the demo model's: conversations of `demo/generate.py` that training never saw, in its chat template, of which
only the replies count (what a user says is random by intent). A perplexity is exp of the mean negative log-probability
of a token; `nats` is that mean, `standard error` of its difference from the first variant's, conversation by
conversation. A model that knows its text by heart may gain from noise, so that the difference can be negative: `change`
is the mean of a token's |difference|, which only grows with the damage, whichever way it turns out. Scores are those of
`demo/evaluate.py`, greedy, over a share of its cases. Variants run one after another in a process; numbers do not depend
on the load of the machine, only the time does.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "demo"))

from quire import LLM, SamplingParams  # noqa: E402
from quire.bench.environment import describe  # noqa: E402

VARIANTS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "int8": {"quantization": "int8"},
    "int4-32": {"quantization": "int4"},
    "int4-64": {"quantization": "int4-64"},
    "int4-128": {"quantization": "int4-128"},
    "KV int8": {"kv_cache_dtype": "int8"},
    "KV float16": {"kv_cache_dtype": "float16"},
    "int4-32, head as it is": {"quantization": "int4", "head": "dense"},
    "int4-32, head int8": {"quantization": "int4", "head": "int8"},
    "int8, head as it is": {"quantization": "int8", "head": "dense"},
    "int8, KV int8": {"quantization": "int8", "kv_cache_dtype": "int8"},
    "int4-32, KV int8": {"quantization": "int4", "kv_cache_dtype": "int8"},
    "float32": {"dtype": "float32"},
}
"""Engine options by name; ``head`` stands in for the format that the output projection gets."""


def conversations(tokenizer: Any, render: Any, count: int) -> list[tuple[list[int], int]]:
    """(token ids, where the last reply begins) of held-out conversations, every task as often as in training."""
    from generate import MIXTURE, Generator

    generator = Generator(seed=30_000, held_out=True)
    tasks = {task: share for task, share in MIXTURE.items() if task != "text"}
    found = []
    for task, share in tasks.items():
        for _ in range(max(1, round(count * share / sum(tasks.values())))):
            example = generator.example(task)
            options = {"tools": example.tools, "enable_thinking": example.thinking}
            prompt = render(example.messages[:-1], add_generation_prompt=True, **options)
            whole = render(example.messages, add_generation_prompt=False, **options)
            if whole.startswith(prompt):
                start = len(tokenizer.encode(prompt, add_special_tokens=False))
                found.append((tokenizer.encode(whole, add_special_tokens=False), start))
    return found


def open_llm(model: str, options: dict[str, Any], device: str) -> LLM:
    """The variant's engine; the head's format is core's constant, replaced here and nowhere else."""
    from quire import quantization
    from quire.weights import load

    own = dict(options)
    head = own.pop("head", None)  # of a head that is the embedding, too: the demo model's is
    load.head_format = quantization.head_format if head is None else lambda _: head
    return LLM(model, device=device, enable_prefix_caching=False, kv_cache_memory_bytes=256 << 20, **own)


def nats_of(llm: LLM, texts: Sequence[tuple[list[int], int]]) -> list[list[float]]:
    """The negative log-probability of each token of each reply."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in texts], params, use_tqdm=False)
    found = []
    for (ids, start), output in zip(texts, outputs, strict=True):
        entries = output.prompt_logprobs
        found.append([-entries[i][ids[i]].logprob for i in range(start, len(ids))])
    return found


def scores_of(llm: LLM, share: float) -> dict[str, Any]:
    """Passed and asked, by group and in all."""
    from evaluate import evaluate, make_cases

    tokenizer, render = llm.get_tokenizer(), llm._text.render_chat

    def answer(prompts: list[Any]) -> list[str]:
        texts = [
            p.text
            if p.text is not None
            else render(p.messages, tools=p.tools, add_generation_prompt=True, enable_thinking=p.thinking)
            for p in prompts
        ]
        ids = [{"prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)} for text in texts]
        params = SamplingParams(max_tokens=160, temperature=0.0)
        return [output.outputs[0].text for output in llm.generate(ids, params, use_tqdm=False)]

    scores, _ = evaluate(answer, make_cases(share))
    passed, asked = (sum(int(s[key]) for s in scores.values()) for key in ("passed", "count"))
    return {"passed": passed, "asked": asked, "groups": {name: [s["passed"], s["count"]] for name, s in scores.items()}}


def compare(found: list[list[float]], base: list[list[float]]) -> dict[str, float]:
    """Perplexity, how many nats a token it is from the base's, give or take (by conversation), and the mean change."""
    tokens = sum(map(len, found))
    nats = sum(map(sum, found)) / tokens
    more = [sum(a) - sum(b) for a, b in zip(found, base, strict=True)]
    spread = statistics.stdev(more) * math.sqrt(len(more)) / tokens if len(more) > 1 else 0.0
    change = sum(abs(x - y) for a, b in zip(found, base, strict=True) for x, y in zip(a, b, strict=True)) / tokens
    return {
        "perplexity": round(math.exp(nats), 5), "nats": round(nats, 6), "more nats": round(sum(more) / tokens, 6),
        "standard error": round(spread, 6), "change": round(change, 6),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="the demo model, or one with its template (default: demo)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--conversations", type=int, default=300)
    parser.add_argument("--scores", type=float, default=0.25, help="share of the evaluation's cases; 0: none")
    parser.add_argument("--variant", action="append", choices=[*VARIANTS], help="only these, the first as the base")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    rows: dict[str, dict[str, Any]] = {}
    texts: list[tuple[list[int], int]] = []
    base: list[list[float]] = []
    print(f"{'variant':24} {'weights':>9} {'perplexity':>10} {'more nats':>10} {'+-':>8} {'change':>8} {'scores':>9}")
    for name in args.variant or VARIANTS:
        begin = time.monotonic()
        llm = open_llm(args.model, VARIANTS[name], args.device)
        texts = texts or conversations(llm.get_tokenizer(), llm._text.render_chat, args.conversations)
        found = nats_of(llm, texts)
        base = base or found
        row: dict[str, Any] = compare(found, base)
        row["weight bytes"] = None if "head" in VARIANTS[name] else llm._engine.memory.weights
        row["bytes a token of KV"] = sum(llm._engine.memory.page_bytes) / llm._engine.memory.page_size
        row["scores"] = scores_of(llm, args.scores) if args.scores else None
        llm.shutdown()
        rows[name] = row
        scored = f"{row['scores']['passed']}/{row['scores']['asked']}" if row["scores"] else "-"
        size = f"{row['weight bytes'] / 2**20:.1f} MiB" if row["weight bytes"] else "-"
        print(
            f"{name:24} {size:>9} {row['perplexity']:10.4f} {row['more nats']:+10.5f} "
            f"{row['standard error']:8.5f} {row['change']:8.5f} {scored:>9}  ({time.monotonic() - begin:.0f} s)",
            flush=True,
        )
        if args.json is not None:  # after each, so that a long run that is stopped has its results
            tokens = sum(len(ids) - start for ids, start in texts)
            content = {
                "kind": "perplexity", "environment": describe(), "model": args.model, "conversations": len(texts),
                "tokens": tokens, "rows": rows,
            }  # fmt: skip
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
