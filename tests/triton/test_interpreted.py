"""The kernels' numbers, under Triton's interpreter: the conformance kit's cases (our own: test_interpreted_cases.py).

What this does not show: that a GPU computes the same. In bfloat16 the interpreter has no product, so factors of
bfloat16 are multiplied as float32.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton.conftest import ROOT, environment, needs_triton

pytestmark = needs_triton

RUN = """
import json, sys
from quire.conformance.kit import Target, run
from quire.hardware import DeviceOptions
from tests.triton.interpreted_device import Interpreted
modules, keyword, file = sys.argv[1].split(","), sys.argv[2], sys.argv[3]
options = DeviceOptions(batch_invariant="company" in modules)
report = run(Target("interpreted", Interpreted, options=options), keyword=keyword, modules=modules)
json.dump(report.as_dict(), open(file, "w"))
"""
ATTENTION = (
    "not latent and (page_sizes and (8 or 256) or head_sizes and (80 or 256) or dtypes or grouped and (14 or 32) or "
    "window and (0-3 or 1-1) or soft_cap and 0.5 or sinks or padding or nothing or freed or past_the_end or two_groups)"
)
PRODUCTS = "moe or route and (8-2 or 256) or gated_mlp or final_head or 37-53 or sums_in_float32 or groups_have"
POINTWISE = "norm or rotary or gated_act or attention_block"


# The kit whole, as docs/how_known.py keeps it: area -> what is chosen of it. A product as wide as a model's, whose bits are
# asked of forty numbers of rows, takes the interpreter minutes; narrow ones have as many parts.
WHOLE = {
    "attention": "",
    "operations": "",
    "pages,memory,loading": "",
    "sampling": "",
    "model": "all and bfloat16 or together and float16 or swapped and float32 or recomputed and float32 or cached and bfloat16 "
    "or chunks and float16",
    "company": "24-36 or 96-64 and float32 or quantized and float32 or 48 or rotary or 52 or moe or sampling or logprobs or "
    "test_attention and heads2 or other_kv",
}


def kit(folder: Path, modules: str, keyword: str, seconds: int = 280) -> list[dict]:
    file = folder / "report.json"
    command = [sys.executable, "-c", RUN, modules, keyword, str(file)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment(interpret=True), capture_output=True, text=True, timeout=seconds
    )
    assert file.exists(), result.stdout + result.stderr
    cases = json.loads(file.read_text())["cases"]
    failed = [f"{case['area']} {case['name']}: {case['message']}" for case in cases if case["outcome"] == "failed"]
    assert not failed
    return [case for case in cases if case["outcome"] == "passed"]


def test_attention_of_the_kit(tmp_path):
    assert len(kit(tmp_path, "attention,pages", f"{ATTENTION} or swap or copies or copy")) >= 20


def test_pointwise_operations_of_the_kit(tmp_path):
    assert len(kit(tmp_path, "operations", POINTWISE)) >= 40


def test_latent_attention_and_sampling_of_the_kit(tmp_path):
    keyword = "latent and (-16 or float8) or logprobs and 1000-0 or noise or greedy or masked or minus_one or no_rows or penal"
    assert len(kit(tmp_path, "attention,sampling", keyword)) >= 12


def test_products_of_the_kit(tmp_path):
    assert len(kit(tmp_path, "operations", PRODUCTS)) >= 60


def test_bits_of_the_kit_do_not_depend_on_company(tmp_path):
    # Log-probabilities over a wide vocabulary take the interpreter half a minute: with the whole kit.
    keyword = "sampling or rotary or 52 or 24-36 and False and float32"
    assert len(kit(tmp_path, "company", keyword)) >= 12


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("areas", WHOLE)
def test_all_of_the_kit(tmp_path, areas):
    passed = kit(tmp_path, areas, WHOLE[areas], 1700)
    assert {case["area"] for case in passed} == set(areas.split(","))
