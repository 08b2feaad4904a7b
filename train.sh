#!/usr/bin/env bash
# GRACE from nothing to a trained encoder, as a story. Two CPU cores and no model hub are enough.
#
#   bash train.sh                       the embedded world, the full recipe        about 4 minutes
#   bash train.sh paper                 the same world by the paper's recipe       about 2 minutes
#   bash train.sh supervised [MODEL]    a real chat model on triplets, from the hub, on one GPU
#   bash train.sh unsupervised [MODEL]  the same on plain sentences
#
# SEED=1 bash train.sh                  another world, warm start and training
# RECIPE=paper bash train.sh supervised the paper to the letter, on a real model
# DATA=my.jsonl bash train.sh supervised my-model/       your own files (see data.py for the formats)
# OUT=runs/mine bash train.sh full --pathwise 0          whatever follows goes to grace.py (after supervised: MODEL first)
set -euo pipefail
cd "$(dirname "$0")"
what=${1:-full}
SEED=${SEED:-0}
[ $# = 0 ] || shift

# 1. An environment: .venv, made once.
. ./setup.sh requirements.txt

# 2. A real backbone? Then one call is the whole story. Defaults are the paper's: B = 64, K = 8,
#    learning rate 1e-6. Weights stay float32; bfloat16 is only what the GPU computes in. README.md
#    has the arithmetic of why this fits into 24 GB.
if [ "$what" = supervised ] || [ "$what" = unsupervised ]; then
  model=${1:-Qwen/Qwen2.5-0.5B-Instruct}
  [ $# = 0 ] || shift
  if [ "$what" = supervised ]; then data=${DATA:-sentence-transformers/all-nli:triplet}
  else data=${DATA:-sentence-transformers/wikipedia-en-sentences}; fi
  dtype=$("$PYTHON" -c 'import torch; print("bfloat16" if torch.cuda.is_available() else "float32")')
  [ "$dtype" = bfloat16 ] || echo "No GPU found: this will run, but slowly."
  recipe=${RECIPE:-full}
  exec "$PYTHON" grace.py --mode "$what" --recipe "$recipe" --model "$model" --data "$data" \
    --out "${OUT:-runs/$what-$recipe-$(basename "$model")}" --dtype "$dtype" --seed "$SEED" --save-every 50 --resume "$@"
elif [ "$what" != full ] && [ "$what" != paper ]; then
  echo "train.sh: '$what' is none of: (nothing), paper, supervised, unsupervised" >&2
  exit 2
fi

# 3. The embedded world: events told in many words, and a tiny language model that has learned to
#    name what happened, poorly. It is written as an ordinary checkpoint and ordinary jsonl files.
world=runs/toy-world-$SEED
if [ ! -f "$world/model/grace_config.json" ]; then
  "$PYTHON" toy.py --out "$world" --seed "$SEED"
fi

# 4. Evaluate, train by reward, evaluate again. Watch ndcg_at_10: is the right positive found among
#    512 held-out texts, half of them negatives that copy the query's words? The control is the line
#    of step 0. The paper's recipe keeps its constant learning rate; see what becomes of `distinct`.
if [ "$what" = full ]; then
  out=${OUT:-runs/toy}
  recipe="--recipe full --lr-decay --steps 250 --infonce-temperature 0.2"
else
  out=${OUT:-runs/toy-paper}
  recipe="--recipe paper --steps 250"
fi
# shellcheck disable=SC2086
"$PYTHON" grace.py $recipe --model "$world/model" --data "$world/data/train.jsonl" \
  --heldout "$world/data/heldout.jsonl" --graded "$world/data/graded.jsonl" --out "$out" \
  --batch 32 --rollouts 4 --lr 5e-4 --eval-every 50 --seed "$SEED" --overwrite "$@"

# 5. The same held-out sets through the evaluator that runs the paper's 16 MTEB tasks.
echo
"$PYTHON" eval_mteb_subset.py --model "$out" --tasks ToyRetrieval,ToyPairs --data-dir "$world/tasks" --out "$out/evaluation.json"

# 6. Read what it writes now, about two tellings of one event and about another event.
echo
"$PYTHON" grace.py explain --model "$out" \
  "the angry physician purchased the lantern near the hostel around dusk ." \
  "around evening the lamp was bought by the furious doctor near the inn ." \
  "around dusk the lantern was mended by the angry physician near the hostel ."
echo
echo "Rationales along the training: $out/rationales.md    Figures: $out/summary.json, $out/metrics.jsonl"
