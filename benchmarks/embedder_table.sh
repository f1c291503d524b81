#!/usr/bin/env bash
# The table of docs/embedder.md: trains the autoencoder five ways on three sample clips, a minute each on one core, and
# holds the results against each other on these clips and on others. The second of the five is the package's own
# (longlive_rag_ops/demo/embedder.safetensors).
#
#   benchmarks/embedder_table.sh OUT [CLIP...]    CLIP: more clips that none of the five has seen
set -euo pipefail
out=${1:?folder for results}
shift
run=${PYTHON:-python3}
mkdir -p "$out"
export OMP_NUM_THREADS=1

"$run" -m longlive_rag_ops latents sample:bikes sample:bunny sample:carphone --frames 16 --out "$out/latents" --quiet
train() {
  local name=$1
  shift
  "$run" -m longlive_rag_ops train-embedder --data "$out/latents" --out "$out/$name" --hidden-dims 24 48 96 \
    --latent-dim 128 --batch-size 8 --chunks-per-clip 8 --epochs 50 --val-split 0.25 --save-every 0 --threads 1 "$@"
}
train plain --delta-weight 0 --smooth-weight 0
train delta --smooth-weight 0
train smooth-0.02 --smooth-weight 0.02
train smooth-0.1 --smooth-weight 0.1
train smooth-1

evaluate() {
  local name=$1 embedders=()
  shift
  for trained in plain delta smooth-0.02 smooth-0.1 smooth-1; do
    embedders+=(--embedder "$trained=$out/$trained/best.safetensors")
  done
  "$run" -m longlive_rag_ops eval-embedder "$@" --embedder average_pool --embedder grid_pool "${embedders[@]}" \
    --out "$out/$name" --quiet
}
evaluate evaluation-seen sample:bikes sample:bunny sample:carphone
evaluate evaluation-unseen sample:speaker "$@"
