#!/usr/bin/env bash
# Makes the environment if it is missing, checks style and types, and runs the tests in two processes.
#   bash tests/run.sh          everything
#   bash tests/run.sh --fast   after each edit: style, and what needs no whole run, no process and no compiler
# Further arguments go to pytest: bash tests/run.sh tests/data -k csv
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/environment.sh requirements.txt requirements-test.txt
export OMP_NUM_THREADS=1 # of each of the two
tests=(.venv/bin/python -m pytest -n 2 --dist loadgroup -ra)

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/clang-format --dry-run -Werror cuda/*.h cuda/*.cu cuda/cpu/* tests/support/*.h
if [ "${1:-}" = --fast ]; then
  exec "${tests[@]}" -m "not slow and not gpu" "${@:2}"
fi
export REAL_CXX="${CXX:-c++}" CXX="$PWD/tests/support/quick_compiler"
# beside mypy, which uses one core; without it tests wait for each other's compilers
{
  .venv/bin/python -c 'from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load(verbose=False)' || true
  PYTHONPATH=src:. .venv/bin/python -m tests.support.compile_first
} >/dev/null 2>&1 &
.venv/bin/mypy
wait
exec "${tests[@]}" -m "not gpu" "$@"
