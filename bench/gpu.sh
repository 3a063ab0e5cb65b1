#!/usr/bin/env bash
# Everything that only a GPU can tell, in under ten minutes, on a bare machine with torch >= 2.11, Triton >= 3.6 and
# pytest, from the checkout and with no package index: ./bench/gpu.sh [cuda|rocm|xpu] [folder for the results]
set -uo pipefail
cd "$(dirname "$0")/.."
DEVICE="${1:-cuda}"
OUT="${2:-bench/results}"
PYTHON="${PYTHON:-python3}"
export PYTHONPATH="core:plugins/triton:plugins/cuda:plugins/rocm:plugins/xpu:.${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -c "import msgspec" 2>/dev/null || PYTHONPATH="$PYTHONPATH:bench/gpu/bare"
mkdir -p "$OUT"
short=0

echo "== the conformance kit on $DEVICE"
timeout 240 "$PYTHON" bench/gpu/kit.py --device "$DEVICE" --json "$OUT/gpu-kit.json" || short=1

echo "== bits with --batch-invariant"
timeout 120 "$PYTHON" bench/gpu/kit.py --device "$DEVICE" --batch-invariant --json "$OUT/gpu-kit-invariant.json" || short=1

echo "== speed"
timeout 240 "$PYTHON" bench/gpu/kernels.py --device "$DEVICE" --json "$OUT/gpu-kernels.json" || short=1

[ "$short" = 0 ] && echo "everything held" || echo "something fell short: see above, and $OUT/gpu-*.json"
exit "$short"
