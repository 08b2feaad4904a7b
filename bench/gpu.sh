#!/usr/bin/env bash
# All that waits for a GPU, as one command: it measures, and writes docs/benchmarks-gpu.md by itself.
#
#   bash bench/gpu.sh                    every part, about 25 minutes on one H100
#   bash bench/gpu.sh machine rollout    these parts; what earlier calls measured stays on the page
#   TINY=1 bash bench/gpu.sh             tiny sizes on a CPU, to see that all of it runs; the page is runs/gpu-tiny/page.md
#
# A part that fails, or takes longer than its limit, says so on the page and takes nothing from the others. What each prints
# lies in runs/gpu/. No network is used once the packages are installed (PYTHON=/path/to/python takes an environment as it
# is); only the comparison with TRL needs more than requirements-dev.txt: `pip install trl`.
set -uo pipefail
cd "$(dirname "$0")/.."
. ./setup.sh requirements-dev.txt
export PYTHON HF_HUB_OFFLINE=1
python() { "$PYTHON" "$@"; }
export -f python

folder=runs/gpu page=docs/benchmarks-gpu.md
lengths="--prompt-tokens 128 --max-new-tokens 256"
model="--shape qwen2.5-0.5b"
sizes="$model --batch 64 --rollouts 8 $lengths" half="$model --batch 32 --rollouts 8 $lengths"
similarity="--rows 4096 --group 8 --dim 896" encode="--n 256 --batch 256 --tokens-per-batch 131072 --repeats 1"
peer="$model --batch 16 --rollouts 8 $lengths --micro-batch 32 --steps 1"
world="OUT=$folder/town bash train.sh"
grown="--max-new-tokens 64 --points 3" profiled="--batch 8"
if [ -n "${TINY:-}" ]; then
  folder=${FOLDER:-runs/gpu-tiny}
  page=$folder/page.md
  lengths="--prompt-tokens 40 --max-new-tokens 8 --device cpu"
  model="--shape 0.4m"
  sizes="$model --batch 2 --rollouts 2 $lengths" half="$model --batch 2 --rollouts 2 $lengths"
  similarity="--rows 64 --group 4 --dim 32 --device cpu" encode="--n 6 --batch 4 --repeats 1"
  world="python -m worlds.make --out $folder/world --world events --steps 20"
  world+=" && python grace.py --model $folder/world/model --data $folder/world/data/train.jsonl --out $folder/town"
  world+=" --batch 4 --rollouts 2 --steps 2 --eval-every 0 --overwrite --device cpu"
  peer="$sizes --micro-batch 2 --steps 1"
  grown="--max-new-tokens 8 --points 2 --device cpu" profiled="--batch 2"
fi
mkdir -p "$folder"

# name, seconds at most, what it shows, command
parts=()
part() { parts+=("$1"); declare -g "limit_$1=$2" "title_$1=$3" "command_$1=$4"; }
part machine 120 "The machine" "python bench/machine.py"
part tests 300 "The tests marked cuda" "python -m pytest -m cuda -rs tests/test_cuda.py tests/test_similarity.py"
part rollout 300 "Rollouts against generate(), and against the floors" \
  "python bench/rollout.py $sizes --skip-update --repeats 2"
part similarity 300 "The in-batch similarity" "python bench/similarity.py $similarity"
part step 420 "A step within the README's memory (there by arithmetic: 21.2 GB)" \
  "python bench/step.py $half --train-roles query,positive --steps 1 --tokens-per-batch 4096 --under 24"
part large 300 "The same step with large micro-batches" \
  "python bench/step.py $half --train-roles query,positive --steps 1 --tokens-per-batch 32768"
part recompute 300 "Large micro-batches and recomputed layers" \
  "python bench/step.py $half --train-roles query,positive --steps 2 --tokens-per-batch 32768 --recompute --under 24"
part profile 240 "What a small step spends its time on" \
  "python bench/step.py $sizes $profiled --steps 1 --tokens-per-batch 32768 --profile"
part encode 240 "The encoder against generate() and a second pass" "python bench/encode.py $model $lengths $encode"
part memory_B 240 "How cost grows with B" "python bench/memory.py --only B $model $grown"
part memory_T 240 "How cost grows with T" "python bench/memory.py --only T $model ${grown#--max-new-tokens * }"
part trl 420 "TRL's GRPOTrainer on the same work" "python bench/trl_peer.py $peer"
part world 600 "The default world" "$world"

of() { local name="$1_$2"; printf '%s' "${!name}"; }

for name in "${@:-${parts[@]}}"; do
  [[ " ${parts[*]} " = *" $name "* ]] || { echo "bench/gpu.sh: '$name' is none of: ${parts[*]}" >&2; exit 2; }
  echo "$(date +%H:%M:%S) $name: $(of title "$name")"
  start=$SECONDS
  timeout -k 10 "$(of limit "$name")" bash -c "$(of command "$name")" > "$folder/$name.txt" 2> "$folder/$name.err"
  echo "$? $((SECONDS - start)) $(date +%F) $(git rev-parse --short HEAD 2> /dev/null || echo unknown)" > "$folder/$name.end"
done

# The page: the goals of all parts in one table, then each part with its command and what it printed.
{
  echo "# Benchmarks on a GPU"
  echo
  echo "Written by \`bash bench/gpu.sh\`, not to be edited. Each part says when it was run and at which commit."
  echo "Weights are random, of the shape that a command names. Floors are made from the two rates that \"The machine\" measures:"
  echo "memory by a copy, arithmetic by a matrix product."
  echo
  echo "| what | goal | reached | part |"
  echo "| --- | ---: | ---: | --- |"
  for name in "${parts[@]}"; do
    [ -f "$folder/$name.end" ] || continue
    read -r code _ < "$folder/$name.end"
    grep '^goal | ' "$folder/$name.txt" | sed "s/^goal //; s/\$/ $name |/"
    [ "$code" = 0 ] || echo "| $(of title "$name") | - | failed | $name |"
  done
  for name in "${parts[@]}"; do
    [ -f "$folder/$name.end" ] || continue
    read -r code seconds day commit < "$folder/$name.end"
    printf '\n## %s\n\n`%s`\n\n' "$(of title "$name")" "$(of command "$name" | tr -s ' \n' ' ')"
    printf '%s s on %s at %s.\n\n' "$seconds" "$day" "$commit"
    if [ "$code" != 0 ]; then
      [ "$code" = 124 ] && why="it took longer than $(of limit "$name") s" || why="exit code $code"
      printf '**Failed**: %s. %s\n\n' "$why" "$(grep -v '^\s*$' "$folder/$name.err" | tail -1 | cut -c1-300)"
    fi
    printf '```\n%s\n```\n' "$(grep -v '^goal | ' "$folder/$name.txt" | tail -60 | cut -c1-160)"
  done
} > "$page"
echo "wrote $page"
