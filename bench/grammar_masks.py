"""How long the mask of one token takes, per schema, on a vocabulary of 32,000 tokens.

    python bench/grammar_masks.py [--json bench/results/grammar-masks.json] [--against xgrammar]

The tokenizer is a byte-level BPE trained here on the standard library's sources. Each text is followed token by token, ten
times over; one figure is the CPU time of one mask, written into memory that is there already, as a step does it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROUNDS = 10
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "born": {"type": "string", "format": "date"},
        "mail": {"type": "string", "pattern": "^[a-z.]{1,20}@[a-z]{1,20}[.]com$"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
    },
    "required": ["name", "age", "born", "mail", "tags"],
    "additionalProperties": False,
}
TREE = {
    "type": "object",
    "properties": {"value": {"type": "number"}, "children": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["value", "children"],
    "additionalProperties": False,
}
FREE = {"type": "object"}
PERSON_TEXT = (
    '{"name": "Ada Lovelace, Countess", "age": 36, "born": "1815-'
    '12-10", "mail": "ada.l@mail.com", "tags": ["red", "blue"]}'
)
TREE_TEXT = (
    '{"value": -1.5e3, "children": [{"value": 2, "children": []},'
    ' {"value": 3.25, "children": [{"value": 0, "children": []}]}]}'
)
FREE_TEXT = (
    '{"a": [1, 2.5, null, {"text": "Free text, of some length: it says much.", "deep": {"er": [[], {}]}}], "z": true}'
)
CASES = {
    "record": ({"json": PERSON}, PERSON_TEXT),
    "recursive": ({"json": TREE}, TREE_TEXT),
    "any object": ({"json": FREE}, FREE_TEXT),
    "regex": ({"regex": r"[A-Z][a-z]+( [a-z]+){0,20}\."}, "The quick brown fox jumps over the lazy dog."),
    "sentence": ({"regex": r"[A-Z][^.!?\n]{10,200}[.!?]"}, "The quick brown fox jumps over the lazy dog."),
    "words of any script": ({"regex": r"\p{L}+( \p{L}+)*"}, "Über den Wolken is the name of a song"),
    "identifier": ({"regex": r"[A-Za-z_][A-Za-z0-9_]{0,40}"}, "name_of_the_Last_One_of_all_24"),
}


def tokenizer_of(vocab_size: int) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from quire.text.tokenizer import Tokenizer

    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    bpe = Backend(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train([str(p) for p in paths if "site-packages" not in p.parts][:800], trainer)
    with tempfile.TemporaryDirectory() as folder:
        bpe.save(f"{folder}/tokenizer.json")
        Path(folder, "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "<s>"}')
        return Tokenizer.load(folder)


def with_quire(tokenizer: Any) -> Callable[[dict[str, Any]], Callable[[], Any]]:
    from quire.sampling.grammar import GrammarCompiler
    from quire.sampling.params import StructuredOutputs

    compiler = GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size)
    words = np.zeros(-(-tokenizer.vocab_size // 32), dtype=np.int32)

    def compile_(structure: dict[str, Any]) -> Callable[[], Any]:
        spec = StructuredOutputs(**structure)
        compiler.matcher(spec)

        def begin() -> tuple[Callable[[], Any], Callable[[int], bool]]:
            matcher = compiler.matcher(spec)
            return lambda: matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes), matcher.consume_token

        return begin

    return compile_


def with_xgrammar(tokenizer: Any) -> Callable[[dict[str, Any]], Callable[[], Any]]:
    import torch
    import xgrammar

    vocabulary = [tokenizer.token_bytes(t) for t in range(tokenizer.vocab_size)]
    stops = list(tokenizer.eos_token_ids)
    info = xgrammar.TokenizerInfo(vocabulary, xgrammar.VocabType.RAW, stop_token_ids=stops)
    compiler = xgrammar.GrammarCompiler(info, max_threads=1)
    words = torch.zeros((1, -(-tokenizer.vocab_size // 32)), dtype=torch.int32)

    def compile_(structure: dict[str, Any]) -> Callable[[], Any]:
        if "json" in structure:
            grammar = compiler.compile_json_schema(json.dumps(structure["json"]), strict_mode=False)
        else:
            grammar = compiler.compile_regex(structure["regex"])

        def begin() -> tuple[Callable[[], Any], Callable[[int], bool]]:
            matcher = xgrammar.GrammarMatcher(grammar)
            return lambda: matcher.fill_next_token_bitmask(words), matcher.accept_token

        return begin

    return compile_


def masks(begin: Callable[[], Any], tokens: list[int]) -> Iterator[float]:
    """Seconds of this thread's CPU time for each mask along the text."""
    for _ in range(ROUNDS):
        mask, consume = begin()
        for token in tokens:
            began = time.thread_time_ns()
            mask()
            yield (time.thread_time_ns() - began) / 1e9
            assert consume(token), "the text is not in the grammar"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--against", choices=["xgrammar"])
    parser.add_argument("--vocab-size", type=int, default=32_000)
    arguments = parser.parse_args()
    tokenizer = tokenizer_of(arguments.vocab_size)
    engines = {f"llguidance {version('llguidance')}": with_quire}
    if arguments.against:
        engines[f"xgrammar {version('xgrammar')}"] = with_xgrammar
    rows = []
    for engine, make in engines.items():
        compile_ = make(tokenizer)
        compile_({"regex": "a"})  # what is made once for a vocabulary is no case's
        for case, (structure, text) in CASES.items():
            tokens = tokenizer.encode(text, add_special_tokens=False)
            began = time.perf_counter()
            try:
                begin = compile_(structure)
            except RuntimeError as error:  # of the other engine, which lacks something
                print(f"engine {engine}  case {case}  refused: {' '.join(str(error).split())[:120]}")
                continue
            compiled = time.perf_counter() - began
            micros = sorted(1e6 * second for second in masks(begin, tokens))
            row = {
                "engine": engine,
                "case": case,
                "tokens": len(tokens),
                "compile_ms": round(1e3 * compiled, 2),
                "median_us": round(statistics.median(micros), 1),
                "p99_us": round(micros[int(len(micros) * 0.99)], 1),
                "max_us": round(micros[-1], 1),
            }
            rows.append(row)
            print("  ".join(f"{name} {value}" for name, value in row.items()))
    if arguments.json:
        from quire.bench.environment import describe

        result = {"vocab_size": tokenizer.vocab_size, "masks": rows, "environment": describe()}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
