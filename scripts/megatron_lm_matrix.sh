#!/usr/bin/env bash
# Train a tiny GPT with Megatron-LM's own script in every supported layout on CPU, and print a table of losses and verdicts.
#   MEGATRON_LM_PATH=<checkout of core_v0.12.1> scripts/megatron_lm_matrix.sh [group or part of a case's name ...]
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" -m tests.hosts.matrix "$@"
