#!/usr/bin/env bash
# On a machine with a CUDA device: builds, runs the GPU tests, replays the traces there, runs the benchmarks.
#
#   benchmarks/gpu.sh OUT        writes logs and results into OUT; needs no network
#   PYTHON=python3 VENV=none     the defaults here: use that interpreter as it is
set -uo pipefail
cd "$(dirname "$0")/.."
: "${1:?usage: benchmarks/gpu.sh OUT}"
out=$(realpath -m "$1")
export PYTHON=${PYTHON:-python3} VENV=${VENV:-none} PYTHONUNBUFFERED=1
python=$PYTHON
[ "$VENV" = none ] || python=$VENV/bin/python
mkdir -p "$out"
status=0
step() { # step NAME COMMAND...: one log a step; a failed step does not stop the next
  local name=$1
  shift
  echo "== $name"
  "$@" >"$out/$name.log" 2>&1 || { status=1; echo "   failed"; }
  tail -n 5 "$out/$name.log"
}
step setup make PYTHON="$PYTHON" VENV="$VENV" setup
step doctor "$python" -m longlive_rag_ops doctor --json
step gpu-tests "$python" -m pytest -q -m gpu
step replay "$python" -m longlive_rag_ops replay --device cuda tests/data/traces/trace_*.safetensors
LONGLIVE_BENCH_OUT=$out step bench "$python" -m pytest -q -s benchmarks
exit $status
