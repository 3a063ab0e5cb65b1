"""Which schemas of the JSON-Schema-Test-Suite are honoured: every instance goes through the masks, token by token.

    python bench/json_schema_suite.py --suite DIR [--json OUT] [--table docs/structured-outputs.md] [--against xgrammar]

DIR is a copy of https://github.com/json-schema-org/JSON-Schema-Test-Suite (the folder with ``tests``), or the folder
``json`` of the source distribution of ``jsonschema``, which carries one; nothing is downloaded. A schema is refused, with
a reason, or each of its instances must be told right. An instance that is invalid and yet accepted is wrong: the status
is then 1, save in the suite's optional tests. One that is valid and yet rejected is not: the output is narrower than
the schema, and still valid. Each instance is given in every order of its keys (up to 24), in tokens of the demo model and
in single bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ORDERS = 24
MARK = "<!-- generated: bench/json_schema_suite.py -->"
COUNTS = ("honoured", "refused", "right", "narrower", "wrong")
Takes = Callable[[list[int], bool], bool]  # (tokens, whether each must be in its mask)
Spellings = list[tuple[Callable[[str], list[int]], bool]]  # (tokens of a text, whether masks hold them)


def orders(value: Any) -> Iterator[Any]:
    """The value with the keys of its objects in each order."""
    if isinstance(value, dict):
        for keys in itertools.permutations(value):
            for values in itertools.product(*(list(itertools.islice(orders(value[k]), ORDERS)) for k in keys)):
                yield dict(zip(keys, values, strict=True))
    elif isinstance(value, list):
        for values in itertools.product(*(list(itertools.islice(orders(v), ORDERS)) for v in value)):
            yield list(values)
    else:
        yield value


def allowed(words: Any, token: int) -> bool:
    return token // 32 < len(words) and bool(int(words[token // 32]) >> (token % 32) & 1)


class Quire:
    """``open(schema)`` says which tokens it takes, or raises with the reason why the schema is refused."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        from quire.sampling.grammar import GrammarCompiler

        self.name, self.version = "quire", f"llguidance {version('llguidance')}"
        self.compiler = GrammarCompiler(lambda: tokenizer, vocab_size)
        self.ends = tokenizer.eos_token_ids

    def open(self, schema: Any) -> Takes:
        import numpy as np

        from quire.sampling.params import StructuredOutputs

        spec = StructuredOutputs(json=json.dumps(schema))
        self.compiler.matcher(spec)

        def takes(tokens: list[int], masked: bool) -> bool:
            matcher = self.compiler.matcher(spec)
            for token in tokens:
                if masked and not allowed(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint32), token):
                    return False
                if not matcher.consume_token(token):
                    return False
            return any(allowed(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint32), e) for e in self.ends)

        return takes


class XGrammar:
    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        import xgrammar

        self.name, self.version, self.xgrammar = "xgrammar", f"xgrammar {version('xgrammar')}", xgrammar
        vocabulary = [tokenizer.token_bytes(t) for t in range(vocab_size)]
        self.ends = tokenizer.eos_token_ids
        info = xgrammar.TokenizerInfo(
            vocabulary, xgrammar.VocabType.RAW, vocab_size=vocab_size, stop_token_ids=self.ends
        )
        self.compiler = xgrammar.GrammarCompiler(info, max_threads=1)

    def open(self, schema: Any) -> Takes:
        grammar = self.compiler.compile_json_schema(json.dumps(schema), strict_mode=False)

        def takes(tokens: list[int], masked: bool) -> bool:
            matcher = self.xgrammar.GrammarMatcher(grammar)
            return all(map(matcher.accept_token, tokens)) and matcher.accept_token(self.ends[0])

        return takes


def read(suite: Path, draft: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(keyword, case) of the draft's tests, the optional ones too: formats are held to here."""
    folder = suite / "tests" / draft
    for path in sorted(folder.rglob("*.json")):
        if path == folder / "format.json":  # that formats are mere annotations
            continue
        keyword = {"optional": "optional: ", "format": "format: "}.get(path.parent.name, "") + path.stem
        for case in json.loads(path.read_text(encoding="utf-8")):
            yield keyword, case


def judge(engine: Any, cases: Iterable[tuple[str, dict[str, Any]]], spellings: Spellings) -> dict[str, Any]:
    keywords: dict[str, Counter[str]] = {}
    reasons: dict[str, list[str]] = {}
    wrong: list[dict[str, Any]] = []
    narrower: list[dict[str, Any]] = []
    for keyword, case in cases:
        counts = keywords.setdefault(keyword, Counter())
        try:
            takes = engine.open(case["schema"])
        except Exception as error:
            counts["refused"] += 1
            reasons.setdefault(keyword, []).append(f"{case['description']}: {' '.join(str(error).split())[:160]}")
            continue
        counts["honoured"] += 1
        for test in case["tests"]:
            texts = [json.dumps(v, ensure_ascii=False) for v in itertools.islice(orders(test["data"]), ORDERS)]
            found = {any(takes(spell(text), masked) for text in texts) for spell, masked in spellings}
            told = {"keyword": keyword, "case": case["description"], "test": test["description"], "data": test["data"]}
            if found == {test["valid"]}:
                counts["right"] += 1
            elif len(found) == 1 and test["valid"]:
                counts["narrower"] += 1
                narrower.append(told)
            else:  # accepted and invalid, or told differently by tokens and bytes
                counts["wrong"] += 1
                wrong.append(told)
    table = {k: {name: c[name] for name in COUNTS} for k, c in sorted(keywords.items())}
    total = {name: sum(row[name] for row in table.values()) for name in COUNTS}
    return {
        "engine": engine.version,
        "total": total,
        "keywords": table,
        "wrong": wrong,
        "narrower": narrower,
        "refused": reasons,
    }


def markdown(results: list[dict[str, Any]]) -> str:
    """Schemas and instances, per keyword, of the first result; the totals of all."""
    first = results[0]
    lines = [
        "| keyword | schemas honoured | refused | instances right | narrower | wrong |",
        "|---|---|---|---|---|---|",
    ]
    for keyword, row in first["keywords"].items():
        lines.append(f"| {keyword} | " + " | ".join(str(row[name]) for name in COUNTS) + " |")
    for result in results:
        lines.append(
            f"| **all, {result['engine']}** | " + " | ".join(f"**{result['total'][n]}**" for n in COUNTS) + " |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--draft", default="draft2020-12")
    parser.add_argument("--against", choices=["xgrammar"], help="another engine to put beside it")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--table", type=Path, help="a Markdown file in which the table between the two marks is replaced"
    )
    arguments = parser.parse_args()

    from quire import plugins
    from quire.text.tokenizer import Tokenizer

    if not (arguments.suite / "tests" / arguments.draft).is_dir():
        parser.error(f"--suite {arguments.suite}: has no folder tests/{arguments.draft}")
    tokenizer = Tokenizer.load(plugins.load().checkpoints["demo"]())
    single = {tokenizer.token_bytes(t): t for t in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(t)) == 1}
    # Where a grammar leaves no choice of bytes, masks have only the tokenizer's own way to spell them.
    spellings: Spellings = [
        (lambda text: tokenizer.encode(text, add_special_tokens=False), True),
        (lambda text: [single[bytes([b])] for b in text.encode()], False),
    ]
    results = []
    for make in [Quire, *([XGrammar] if arguments.against else [])]:
        began = time.monotonic()
        engine = make(tokenizer, tokenizer.vocab_size)
        results.append(judge(engine, read(arguments.suite, arguments.draft), spellings))
        print(f"{engine.version}: {results[-1]['total']} in {time.monotonic() - began:.0f} s")
    first = results[0]
    for told in first["wrong"]:
        print("wrong:", json.dumps(told))
    if arguments.json:
        for other in results[1:]:  # of the other engine the numbers say enough
            for name in ("wrong", "narrower", "refused"):
                del other[name]
        from quire.bench.environment import describe

        environment = describe()
        environment["command"] = ["bench/json_schema_suite.py"]  # its arguments are paths of this machine
        content = {"draft": arguments.draft, "environment": environment, "results": results}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.table:
        before, _, after = arguments.table.read_text(encoding="utf-8").split(MARK)
        arguments.table.write_text(f"{before}{MARK}\n{markdown(results)}\n{MARK}{after}", encoding="utf-8")
    return 1 if any(not told["keyword"].startswith("optional") for told in first["wrong"]) else 0


if __name__ == "__main__":
    sys.exit(main())
