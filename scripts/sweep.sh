#!/usr/bin/env bash
# The slow tests: long parity runs and pairwise feature combinations. Usage: bash scripts/sweep.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
exec bash scripts/test.sh -m slow --timeout 3600 "$@"
