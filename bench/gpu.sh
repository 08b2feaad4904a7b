#!/usr/bin/env bash
# Every benchmark on a GPU, in half an hour at most. What they print is also kept in runs/bench/gpu.txt.
#
#   bash bench/gpu.sh           the comparison with TRL runs where `pip install trl` has been done
#   TINY=1 bash bench/gpu.sh    tiny sizes on a CPU, to see that all of it runs
set -uo pipefail
cd "$(dirname "$0")/.."
. ./setup.sh requirements-dev.txt
export HF_HUB_OFFLINE=1
mkdir -p runs/bench

model="--shape qwen2.5-0.5b --prompt-tokens 128 --max-new-tokens 256" device="--device cuda"
B=64 N=4096 texts=256 tests="-m cuda"
if [ -n "${TINY:-}" ]; then
  model="--shape tiny --prompt-tokens 30 --max-new-tokens 8" device="--device cpu"
  B=8 N=64 texts=8 tests="--version"
fi

# A part that fails, or takes longer than five minutes, takes nothing from the others.
bench() {
  echo
  echo "\$ python $*"
  timeout 300 "$PYTHON" "$@" 2>&1 || echo "failed with exit code $?"
}

{
  echo "$(date +%F), commit $(git rev-parse --short HEAD)"
  bench -m pytest $tests
  bench bench/rollout.py $model $device --batch $B --repeats 2
  bench bench/similarity.py $device --rows $N
  bench bench/step.py $model $device --batch $((B / 2)) --train-roles query,positive --steps 2
  bench bench/step.py $model $device --batch $((B / 4)) --train-roles query,positive --steps 2 --peer trl
  bench bench/encode.py $model $device --n $texts --batch 256 --tokens-per-batch 131072 --repeats 1
} | tee runs/bench/gpu.txt
