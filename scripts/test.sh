#!/usr/bin/env bash
# Makes the test environment and runs the suite. Usage: bash scripts/test.sh [pytest arguments]
# With a Megatron-LM core_v0.12.1 checkout: MEGATRON_LM_PATH=/path/to/Megatron-LM bash scripts/test.sh
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/_environment.sh
. scripts/_environment.sh
make_environment train,test
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the suite is parallel by processes; threads on top only fight for cores
if [ $# -eq 0 ]; then
  ruff check .
  ruff format --check .
  mypy
  set -- -m "not slow and not cuda and not npu"
fi
exec python -m pytest "$@"
