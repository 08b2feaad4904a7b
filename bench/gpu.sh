#!/usr/bin/env bash
# Every benchmark on a GPU, in half an hour at most; the comparison with TRL needs `pip install trl`. A part that fails, or
# takes longer than five minutes, takes nothing from the others.
cd "$(dirname "$0")/.."
. ./setup.sh requirements-dev.txt
export HF_HUB_OFFLINE=1

model="--device cuda --shape qwen2.5-0.5b --prompt-tokens 128 --max-new-tokens 256"
bench() {
  printf '\n$ python %s\n' "$*"
  timeout 300 "$PYTHON" "$@" || echo "failed with exit code $?"
}

bench -m pytest -m cuda
bench bench/rollout.py $model --batch 64 --repeats 2
bench bench/similarity.py --device cuda
bench bench/step.py $model --batch 32 --train-roles query,positive --steps 2
bench bench/step.py $model --batch 16 --train-roles query,positive --steps 2 --peer trl
bench bench/encode.py $model --n 256 --batch 256 --tokens-per-batch 131072 --repeats 1
