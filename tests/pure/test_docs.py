"""What the documentation quotes is what the repository holds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_quotations_and_tables_are_current():
    assert sum(page.read_text().count("<!-- table:") for page in PAGES) >= 6
    result = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"`make ([a-z-]+)", page.read_text()) + re.findall(
            r"^make ([a-z-]+)", page.read_text(), re.M
        ):
            assert target in targets, f"{page.name} names `make {target}`"


def test_every_test_that_the_security_page_names_exists():
    rows = [line for line in (ROOT / "docs/security.md").read_text().splitlines() if "`tests/" in line]
    named = [test for row in rows for test in re.findall(r"`(tests/[^`]+)`", row.rsplit("|", 2)[1])]
    assert len(rows) >= 20
    assert len(named) >= len(rows)
    for test in named:
        path, *names = test.split("::")
        source = (ROOT / path).read_text()
        *groups, function = names
        assert re.search(rf"^\s*def {function}\(", source, re.MULTILINE), test
        assert all(re.search(rf"^class {group}\b", source, re.MULTILINE) for group in groups), test
