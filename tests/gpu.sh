#!/usr/bin/env bash
# On a machine with a GPU: build every kernel, check it, check a training step of each version, then measure.
#   bash tests/gpu.sh [--peer NAME=FOLDER ...]      (peers: see benchmarks/peers.py)
# Needs Python with PyTorch (and Triton for a peer), ninja, and nvcc or hipcc. Takes less than 8 minutes. Writes gpu.json
# and gpu.md into $OUT, or into benchmarks/ if OUT is not set. Ends non-zero when a kernel is wrong.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks}
python=${PYTHON:-python3}
mkdir -p "$out"
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT

timeout 200 "$python" tests/gpu_check.py --json "$parts/check.json" | tee "$parts/check.md"
checked=${PIPESTATUS[0]}
timeout 260 "$python" benchmarks/kernels.py --device cuda --seconds 1.5 --json "$parts/kernels.json" "$@" | tee "$parts/kernels.md"
measured=${PIPESTATUS[0]}

cat "$parts"/kernels.md <(echo) "$parts"/check.md >"$out/gpu.md"
"$python" - "$parts" "$out/gpu.json" <<'PYTHON'
import json, pathlib, sys
parts = {path.stem: json.loads(path.read_text()) for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json"))}
pathlib.Path(sys.argv[2]).write_text(json.dumps(parts, indent=1) + "\n")
PYTHON
echo "written: $out/gpu.md and $out/gpu.json"
[ "$checked" = 0 ] || { echo "NOT RIGHT: see $out/gpu.md (status $checked)" >&2; exit 1; }
[ "$measured" = 0 ] || { echo "the benchmark did not end well (status $measured)" >&2; exit 1; }
