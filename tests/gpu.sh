#!/usr/bin/env bash
# On a machine with a GPU: the tests that need one (every kernel, a training step of each version), then the benchmark.
#   bash tests/gpu.sh [--peer NAME=FOLDER ...]      (peers: see benchmarks/peers.py)
# Needs Python with PyTorch and pytest (and Triton), ninja, and nvcc or hipcc. Takes less than 8 minutes. Writes gpu.json
# (times), gpu.xml (each test with its error) and gpu.md into $OUT, or into benchmarks/ if OUT is not set. Ends non-zero when a
# kernel is wrong or cannot run.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks}
python=${PYTHON:-python3}
mkdir -p "$out"
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "tests/gpu.sh needs a GPU, and the PyTorch of $python finds none (set PYTHON=/path/to/python for another)" >&2
  exit 2
}
timeout 200 "$python" -m pytest -m gpu -vv -p no:cacheprovider --junitxml="$out/gpu.xml" tests/ops/test_on_gpu.py |
  tee "$parts/tests.md"
checked=${PIPESTATUS[0]}
timeout 260 "$python" benchmarks/kernels.py --device cuda --seconds 1.5 --json "$out/gpu.json" "$@" | tee "$parts/kernels.md"
measured=${PIPESTATUS[0]}

cat "$parts"/kernels.md <(printf '\n```\n') "$parts"/tests.md <(echo '```') >"$out/gpu.md"
echo "written: $out/gpu.md, $out/gpu.xml and $out/gpu.json"
[ "$checked" = 0 ] || { echo "NOT RIGHT: see $out/gpu.md (status $checked)" >&2; exit 1; }
[ "$measured" = 0 ] || { echo "the benchmark did not end well (status $measured)" >&2; exit 1; }
