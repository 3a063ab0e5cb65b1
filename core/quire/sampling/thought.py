"""A grammar that begins behind the model's reasoning: reasoning is free text up to its end mark, then the grammar starts.

It is one grammar with the other inside, so a row's state stays a function of its output tokens: forks, preemption and
restarts have nothing more to know.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from quire.sampling.params import Thinking


def after(thinking: Thinking, grammar: str, special: Callable[[str], int | None]) -> str:
    """``grammar`` (of llguidance) behind the reasoning. ``special``: the id of a special token, which text cannot spell."""
    ends = []
    rules = [r"GAP: /[ \r\n\t]{1,8}/", r"TEXT: /(.|\n)*/"]
    for i, mark in enumerate(thinking.ends):
        parts = _parts(mark, special)
        if parts[0].startswith("<["):
            ends.append(" ".join(["TEXT", *parts]))
        else:
            rules.append(f"end_{i}[lazy]: TEXT {parts[0]}")
            ends.append(" ".join([f"end_{i}", *parts[1:]]))
    thought = f"({' | '.join(ends)}) GAP?"
    if not thinking.opened:
        starts = " | ".join(" ".join(_parts(mark, special)) for mark in thinking.starts)
        thought = f"(GAP? ({starts}) {thought})?"
    top = "\n".join([f"start: {thought} @answer", *rules])
    grammars = json.loads(grammar)["grammars"] if grammar.startswith("{") else [{"lark_grammar": grammar}]
    grammars[0]["name"] = "answer"
    return json.dumps({"grammars": [{"lark_grammar": top}, *grammars]})


def _parts(mark: str, special: Callable[[str], int | None]) -> list[str]:
    """A mark as terminals: special tokens by id, the text between them as it is."""
    parts: list[str] = []
    text = ""
    while mark:
        # Special tokens of chat formats end with a bracket of the kind that they begin with.
        end = next((n for n in range(len(mark), 1, -1) if mark[n - 1] in ">]" and special(mark[:n]) is not None), 0)
        if end:
            parts += [json.dumps(text, ensure_ascii=False)] * bool(text) + [f"<[{special(mark[:end])}]>"]
            mark, text = mark[end:], ""
        else:
            mark, text = mark[1:], text + mark[0]
    return parts + [json.dumps(text, ensure_ascii=False)] * bool(text)
