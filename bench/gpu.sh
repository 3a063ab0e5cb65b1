#!/usr/bin/env bash
# Everything that only a GPU can tell, in under ten minutes, on a bare machine with torch >= 2.11, Triton >= 3.6,
# numpy and pytest, from the checkout and with no package index: ./bench/gpu.sh [all | kit | speed | PART ...] [--device cuda]
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
export PYTHONPATH="bench:core:plugins/triton:plugins/cuda:plugins/rocm:plugins/xpu:.${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -c "import msgspec" 2>/dev/null || PYTHONPATH="$PYTHONPATH:bench/gpu/bare"
exec "$PYTHON" -m gpu.run "$@"
