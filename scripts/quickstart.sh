#!/usr/bin/env bash
# From nothing to a trained small GPT: environment, installation, 200 steps on 2 processes, loss curve, checkpoint.
# Usage: bash scripts/quickstart.sh [DIRECTORY] [options of `mindspeed quickstart`]
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/_environment.sh
. scripts/_environment.sh
make_environment train
exec mindspeed quickstart "$@"
