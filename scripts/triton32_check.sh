#!/usr/bin/env bash
# The kernel tests once more with Triton 3.2, whose language triton-ascend speaks: in the interpreter, and compiled for sm_80 and sm_90.
# Usage: bash scripts/triton32_check.sh     needs no GPU; about 2 minutes after the installation.
# Variables: PYTHON (3.10 to 3.13; Triton 3.2 has no wheel for later ones), MINDSPEED_TRITON32_VENV (default .venv-triton32).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${MINDSPEED_TRITON32_VENV:-.venv-triton32}

if ! "$venv/bin/python" -c 'import triton, sys; sys.exit(not triton.__version__.startswith("3.2."))' 2>/dev/null; then
  "${PYTHON:-python3}" -m venv "$venv"
  # Triton 3.2's interpreter fails on loops over loaded numbers with NumPy 2.4.
  grep -vi '^numpy\|^triton' constraints.txt >"$venv/constraints.txt"
  "$venv/bin/pip" install --quiet --disable-pip-version-check -c "$venv/constraints.txt" 'torch' 'numpy<2.4' -e '.[test]'
  # torch may name a later Triton as its own; the kernels use nothing of torch that needs it.
  "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps 'triton==3.2.0' setuptools
fi

export OMP_NUM_THREADS=1
exec "$venv/bin/python" -m pytest -q -p no:cacheprovider tests/ops_kernels -k 'triton and not cuda and not gpu' "$@"
