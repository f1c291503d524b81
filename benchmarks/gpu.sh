#!/usr/bin/env bash
# On a machine with a CUDA device: builds, runs the GPU tests, replays the traces on every engine, measures, checks
# memory accesses, reports what the kernels compile to. Nine minutes at most; steps that this leaves no time for are
# run by a call of their own, such as STEPS='setup block'.
#
#   benchmarks/gpu.sh OUT        writes a log for each step and the results into OUT; needs no network
#   PYTHON=python3 VENV=none     the defaults here: use that interpreter as it is
#   LIMIT=540                    seconds for all of it
#   STEPS='setup gpu-ops'        only these steps
set -uo pipefail
cd "$(dirname "$0")/.."
: "${1:?usage: benchmarks/gpu.sh OUT}"
out=$(realpath -m "$1")
export PYTHON=${PYTHON:-python3} VENV=${VENV:-none} PYTHONUNBUFFERED=1 LONGLIVE_BENCH_OUT=$out
python=$PYTHON
[ "$VENV" = none ] || python=$VENV/bin/python
mkdir -p "$out"
: >"$out/summary"
status=0
make_it=(make PYTHON="$PYTHON" VENV="$VENV" BENCH_OUT="$out")

step() { # step NAME SECONDS COMMAND...: one log a step; a failed or late step does not stop the next
  local name=$1 seconds=$2 began=$SECONDS left=$((${LIMIT:-540} - SECONDS)) code=0 verdict=ok
  shift 2
  case " ${STEPS:-$name} " in *" $name "*) ;; *) return ;; esac
  echo "== $name"
  if [ "$left" -lt 5 ]; then
    code=124
  else
    timeout -k 5 "$((seconds < left ? seconds : left))" "$@" >"$out/$name.log" 2>&1 || code=$?
    tail -n 5 "$out/$name.log"
  fi
  case $code in
    0) ;;
    124 | 137) verdict='OUT OF TIME' ;;
    *) verdict="FAILED ($code)" ;;
  esac
  [ "$code" -eq 0 ] || status=1
  printf '%-16s %4d s  %s\n' "$name" "$((SECONDS - began))" "$verdict" >>"$out/summary"
}

replay() { # every trace on every engine
  local engine failed=0
  for engine in triton dense auto; do
    "$python" -m longlive_rag_ops replay --device cuda --engine $engine tests/data/traces/trace_*.safetensors || failed=1
  done
  return $failed
}
export -f replay
export python

# Kernels compile once and are cached, so tests run in several processes where pytest can: they mostly wait for that.
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)

step setup 120 "${make_it[@]}" setup
step doctor 30 "$python" -m longlive_rag_ops doctor --json
step gpu-tests 240 env OMP_NUM_THREADS=2 "$python" -m pytest -q -m gpu "${workers[@]}"
step triton-tests 150 env OMP_NUM_THREADS=2 "$python" -m pytest -q -m 'not slow' tests/test_triton_*.py "${workers[@]}"
step replay 80 bash -c replay
step gpu-ops 150 "$python" -m benchmarks.gpu_ops
step gpu-bank 90 "$python" -m benchmarks.gpu_bank
# As make bench-gpu, one at a time.
suite() { step "$1" "$2" "$python" -m longlive_rag_ops bench "$1" --preset gpu --out "$out"; }
suite quality 120
suite scaling 200
suite micro 300
suite block 590
step gpu-check 120 "${make_it[@]}" gpu-check
step compile 100 "$python" -m longlive_rag_ops compile --arch 90

echo "== summary"
cat "$out/summary"
for log in gpu-ops gpu-bank quality scaling micro block; do
  [ ! -f "$out/$log.log" ] || sed -n '/^  target /,$p' "$out/$log.log"
done
exit $status
