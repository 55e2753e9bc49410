# Sourced from the project's root: a virtual environment in .venv that holds the requirement files given as arguments,
# and the command rwkv-rlhf, which runs what lies in src/.
# A stamp of their contents makes a second run start at once.
environment_stamp=$(cat "$@" | cksum)
if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed (set PYTHON=/path/to/python3.11)" >&2
    exit 2
  }
  "${PYTHON:-python3}" -m venv .venv
fi
if ! grep -qsxF "$environment_stamp" .venv/installed; then
  for requirements in "$@"; do
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
  done
  echo "$environment_stamp" >>.venv/installed
fi
if [ ! -x .venv/bin/rwkv-rlhf ]; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc 2>/dev/null || echo 2)}"
