#!/usr/bin/env bash
# Makes the environment if it is missing, then runs every test. Extra arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/environment.sh requirements.txt requirements-test.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest "$@"
