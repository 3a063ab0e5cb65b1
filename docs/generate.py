"""Fill quoted files and tables into the documentation: `python docs/generate.py`; `--check` only says whether they are current.

Between ``<!-- quote: PATH -->`` and ``<!-- end quote -->`` stands the whole file PATH (from the repository's root), so
that what the documentation shows is what the tests run. Between ``<!-- table: WHAT -->`` and ``<!-- end table -->`` stands a
table of bench/cpu_table.py: ``ratios``, or a machine's results and a shape (``cpu-zen4 qwen05``), beside vLLM with ``vllm``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import cpu_table  # noqa: E402

TABLE = re.compile(r"(<!-- table: (?P<what>[^>]+?) -->\n).*?(<!-- end table -->)", re.DOTALL)
QUOTE = re.compile(r"(<!-- quote: (?P<path>\S+) -->\n).*?(<!-- end quote -->)", re.DOTALL)
LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "bash"}


def filled(text: str) -> str:
    """The text with every quotation and every table brought up to date."""

    def quote(match: re.Match[str]) -> str:
        path = ROOT / match["path"]
        return f"{match[1]}```{LANGUAGES.get(path.suffix, '')}\n{path.read_text().rstrip()}\n```\n{match[3]}"

    def table(match: re.Match[str]) -> str:
        name, *rest = match["what"].split()
        return match[1] + (cpu_table.ratios() if name == "ratios" else cpu_table.machine(name, *rest)) + match[3]

    return TABLE.sub(table, QUOTE.sub(quote, text))


def main() -> int:
    stale = []
    for page in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]):
        text = page.read_text()
        if filled(text) != text:
            stale.append(page.relative_to(ROOT))
            if "--check" not in sys.argv:
                page.write_text(filled(text))
    for page in stale:
        print(f"{page}: {'is not current: run `make docs`' if '--check' in sys.argv else 'brought up to date'}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
