#!/usr/bin/env bash
# The native tests on kernels built with the address and undefined-behaviour sanitizers (`make sanitize`). Arguments go to
# pytest. PYTHON names the interpreter of an environment in which nanobind and the tests' requirements are installed,
# ISAS the instruction sets to build and to test, of those in CMakeLists.txt ("all": every one, and the portable one);
# without it, those of this processor.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python}
BUILD=${BUILD:-$PWD/build/sanitize}
if ! command -v g++ >/dev/null; then
  echo "sanitize: not run, since there is no g++ here"
  exit 0
fi
# Of the vectors of 512 bits, those with the most in them: the plainer ones share their sources.
ISAS=${ISAS:-$("$PYTHON" -c 'from quire_cpu import native; print(";".join(n for n in native.isas() if n in ("avx2", "avx512_bf16", "amx")))')}
cmake -S plugins/cpu -B "$BUILD" -DQUIRE_SANITIZE=ON "-DQUIRE_ISAS=$ISAS" "-DPython_EXECUTABLE=$(command -v "$PYTHON")" >/dev/null
cmake --build "$BUILD" --parallel "${JOBS:-2}" >/dev/null
mkdir -p "$BUILD/package/quire_cpu"
cp plugins/cpu/quire_cpu/*.py "$BUILD"/_native*.so "$BUILD/package/quire_cpu/"
# An editable installation finds its own folder first: look in PYTHONPATH before.
echo 'import sys, importlib.machinery; sys.meta_path.insert(0, importlib.machinery.PathFinder)' >"$BUILD/package/sitecustomize.py"

run() {
  rm -f "$BUILD"/report.*
  # Python itself is not instrumented: the runtime is loaded first, and leaks of the interpreter are none of ours. Reports
  # go to files, since pytest holds what is printed and ends with the process.
  env LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS="detect_leaks=0:verify_asan_link_order=0:log_path=$BUILD/report" \
    UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1:log_path=$BUILD/report" \
    PYTHONPATH="$BUILD/package" "$PYTHON" "$@"
}

# A run that could not find anything must not pass: a kernel that reads beyond its weights has to be caught.
if run tests/native/overrun.py || ! grep -qs heap-buffer-overflow "$BUILD"/report.*; then
  echo "sanitize: the kernel that reads beyond its weights was not caught" >&2
  exit 1
fi
[ "$ISAS" = all ] || set -- -k "not portable" "$@"
run -m pytest tests/native "$@" || { cat "$BUILD"/report.* >&2; exit 1; }
