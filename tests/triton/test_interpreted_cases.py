"""Our own cases of the kernels under Triton's interpreter, in a process of their own that imports it so.

They stand in a file of their own so that a second worker runs them beside the kit's (test_interpreted.py).
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.triton.conftest import ROOT, environment, needs_triton

pytestmark = needs_triton


@pytest.mark.parametrize("cases", ["cases", "caches", "sampling", "products"])
def test_cases_of_our_own(cases):
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-rs", f"tests/triton/interpreted_{cases}.py"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment(interpret=True), capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout
