#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one run of under 9 minutes: the tests marked `cuda`, then the kernel and step benchmarks.
# Usage: bash scripts/gpu_check.sh [FOLDER]     results go to FOLDER (default gpu-check): summary.json, benchmarks.json,
# tests-*.jsonl with the outcome and tests-*.log with the output of the tests. All but the summary grow while the parts run.
# Exit code: 0 fine, 1 a test failed or a figure missed what it must reach, 2 could not run, 3 a wrong result in a benchmark.
# The interpreter is the active one, or $PYTHON; it needs torch with CUDA and `pip install -e '.[cuda,train,test]'`.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=${1:-gpu-check}

refuse() { # refuse MESSAGE
  echo "gpu_check: $1" >&2
  exit 2
}

command -v "$python" >/dev/null 2>&1 || refuse "$python is not on PATH; activate an environment or set PYTHON"
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' 2>/dev/null) ||
  refuse "torch does not import in $("$python" -c 'import sys; print(sys.executable)'); pip install -e '.[cuda,train,test]'"
[ -n "$gpu" ] || refuse "torch sees no NVIDIA GPU; check nvidia-smi, and that torch is not a CPU build ($("$python" -c 'import torch; print(torch.__version__)'))"
"$python" -c 'import triton, pytest, mindspeed' 2>/dev/null || refuse "triton, pytest or mindspeed is missing; pip install -e '.[cuda,train,test]'"

mkdir -p "$out"
out=$(cd "$out" && pwd)
rm -f "$out"/summary.json "$out"/tests-*.jsonl "$out"/tests-*.log "$out"/benchmarks.json # a part that dies must not leave an older run's results as its own
export TRITON_DEFAULT_FP_FUSION=1 # unset, Triton 3.9 warns that 3.10 changes the default
export CUDA_DEVICE_MAX_CONNECTIONS=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # operator tests ask for deterministic algorithms, under which cuBLAS refuses to run without it
started=$(date +%s)
echo "gpu_check on $gpu"

# The tests come first: they also fill the compile cache, so that the benchmarks measure kernels and not compilers.
timeout --signal=INT --kill-after=10 235 "$python" scripts/_gpu_tests.py "$out" "${GPU_CHECK_TEST_SECONDS:-220}"
tests=$?
spent=$(($(date +%s) - started))
timeout --signal=INT --kill-after=10 $((520 - spent)) "$python" -m benchmarks ops step --device cuda --preset standard --rounds 3 \
  --timeout-per-case 45 --seconds $((500 - spent)) --check --json "$out/benchmarks.json" >"$out/benchmarks.log" 2>&1
figures=$?

"$python" scripts/_gpu_summary.py "$out" "$gpu" "$tests" "$figures" "$(($(date +%s) - started))"
