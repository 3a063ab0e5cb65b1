"""The support matrix of the documentation, from JSON reports:
``python -m quire.conformance.matrix REPORT.json ... > docs/support-matrix.md``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DECLARED = (
    "dtypes",
    "kv_dtypes",
    "page_sizes",
    "head_sizes",
    "latent_sizes",
    "quantization",
    "graphs",
    "collectives",
    "batch_invariant",
)


def mark(cases: Sequence[dict[str, Any]]) -> str:
    """What came of an area: yes, no with the count of failures, or a dash where nothing is declared."""
    failed = sum(case["outcome"] == "failed" for case in cases)
    passed = sum(case["outcome"] == "passed" for case in cases)
    if failed:
        return f"**fails {failed} of {failed + passed}**"
    return f"passes {passed}" if passed else "not declared"


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def matrix(reports: Sequence[dict[str, Any]]) -> str:
    """Markdown: what each device declares, and what the kit found."""
    areas = sorted({case["area"] for report in reports for case in report["cases"]} - {"speed"})
    head = ["", *(f"`{r['device']}`" for r in reports)]
    rows = [
        ["plugin", *(f"{r['distribution']} {r['version']}" for r in reports)],
        ["contract", *(r["contract"] for r in reports)],
        ["torch, machine", *(f"{r['torch']}, {r['machine']}" for r in reports)],
    ]
    rows += [[name.replace("_", " "), *(cell(r["capabilities"].get(name, [])) for r in reports)] for name in DECLARED]
    found = [[a, *(mark([c for c in r["cases"] if c["area"] == a]) for r in reports)] for a in areas]
    return "\n".join(
        [
            "# Support matrix",
            "",
            "Generated from reports of `quire conformance --device NAME --json FILE` by",
            "`python -m quire.conformance.matrix FILE ...`; do not edit. What a device does not declare is not tested.",
            "",
            "## Declared",
            "",
            *_table(head, rows),
            "",
            "## Found by the kit",
            "",
            *_table(head, found),
            "",
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    print(matrix([json.loads(Path(name).read_text()) for name in sys.argv[1:]]), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
