"""Runs two ranks, forked from this process, and compares them with one process. tests/test_ranks.py asserts what it prints.

python tests/two_ranks.py WORLD [NAME...]        a line of JSON per check; WORLD: an embedded world (worlds/make.py)

The ranks are started, and ended when one of them fails, as torchrun does it, but from a process that has imported
everything once. A test runs torchrun itself.
"""

import contextlib
import copy
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from conftest import ROWS, build, command, config  # noqa: E402
from plumbing.checkpoint import checkpoints  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import eval_mteb_subset  # noqa: E402
import grace  # noqa: E402
from evaluation.encoder import GraceEncoder, text_loss  # noqa: E402
from plumbing import ranks  # noqa: E402
from plumbing.errors import GraceError  # noqa: E402
from policy import Policy  # noqa: E402
from prompt import Reading  # noqa: E402
from worlds.make import INSTRUCTION, build_tokenizer  # noqa: E402

# ---------------------------------------------------------------- two processes


def forked(function, folder, n=2):
    """`function()` in n ranks. Returns their exit codes, and what they wrote to the terminal, `[(code, text)]`."""
    store, pids, status = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False), [], {}
    for rank in range(n):
        if pid := os.fork():
            pids.append(pid)
            continue
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
        os.environ |= {name: str(x) for name, x in place.items()} | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        output, code = os.open(f"{folder}/rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1
        os.dup2(output, 1), os.dup2(output, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        try:
            ranks.start()
            function()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            if not isinstance(stop.code, int):
                print(stop.code, file=sys.stderr)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    while len(status) < n:
        pid, result = os.wait()
        status[pid] = os.waitstatus_to_exitcode(result)
        if status[pid]:
            time.sleep(0.1)
            for other in set(pids) - set(status):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGTERM)
    return [(status[pid], Path(f"{folder}/rank-{rank}.txt").read_text()) for rank, pid in enumerate(pids)]


def returned(function, folder, n=2):
    """What `function()` returns on each rank."""
    ended = forked(lambda: torch.save(function(), f"{folder}/{os.environ['RANK']}.pt"), folder, n)
    assert all(code == 0 for code, _ in ended), ended
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(n)]


# ---------------------------------------------------------------- steps

MORE = [
    ROWS[0] | {"positive": "the boat was found ."},  # shares a text with the first row: they are twins
    {
        "query": "a very old lamp near the forest around noon",
        "positive": "somebody hid the old lamp around noon near the forest .",
        "negative": ["the boat"],
    },
]
SHARDED = dict(shard=True, batch=4, tokens_per_batch=60)
CASES = {  # settings of a run of two steps
    "full": dict(batch=5, minibatches=2, tokens_per_batch=60, prompt_weight=0.5),
    "paper": dict(recipe="paper", batch=5, minibatches=2, kl=0.1),
    "full unsupervised": dict(mode="unsupervised", batch=5, epochs=2, tokens_per_batch=60),
    "paper unsupervised": dict(recipe="paper", mode="unsupervised", batch=3),
    "negatives too": dict(train_roles="query,positive,negative", batch=2, kl_estimator="k2"),
    "sharded": dict(**SHARDED, minibatches=2, prompt_weight=0.5),
    "sharded and recomputed": dict(**SHARDED, recompute=True, recipe="paper", kl=0.1),
}


def two_steps(settings, starve=False):
    """Ids, weights and metrics of two steps in float64, by gradient descent. starve: the second rank runs out of memory."""
    tokenizer, rows = build_tokenizer(), ROWS[:3] + MORE
    if settings.get("mode") == "unsupervised":
        rows = [{"text": text} for row in rows for text in (row["query"], row["positive"])]
    model = build("Qwen2", len(tokenizer), tie_word_embeddings=True).double()
    policy = Policy(model, tokenizer, Reading(INSTRUCTION, max_prompt_tokens=64, max_new_tokens=6))
    given = {**settings, "shard": settings.get("shard", False) and ranks.size() > 1}
    trainer = grace.Trainer(policy, copy.deepcopy(policy), rows, config(max_grad_norm=1e9, **given))
    trainer.optimizer = torch.optim.SGD(policy.model.parameters(), lr=1e-2)
    ids, metrics, sample, objective = [], [], trainer.sample, trainer.objective

    def recorded(texts):
        rollouts, *embeddings = sample(texts)
        ids.append(rollouts.ids)
        return rollouts, *embeddings

    def starved(*args):
        if starve and not ranks.first() and len(ids) < 2 and len(args[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return objective(*args)

    trainer.sample, trainer.objective = recorded, starved
    for _ in range(2):
        metrics.append({name: x for name, x in trainer.step().items() if not name.endswith(("_s", "_gb"))})
    whole = torch.cat([ranks.whole(p.detach()).flatten() for p in policy.model.parameters()])
    start = torch.cat(
        [p.detach().flatten() for p in build("Qwen2", len(tokenizer), tie_word_embeddings=True).double().parameters()]
    )
    return {"ids": ids, "weights": whole, "start": start, "metrics": metrics, "budget": trainer.tokens_per_batch}


def compared(one, each):
    """How the ranks differ from one process, and how far that had moved."""
    same_ids = all(all(torch.equal(a, b) for a, b in zip(rank["ids"], one["ids"])) for rank in each)
    off = max(float((rank["weights"] - one["weights"]).abs().max()) for rank in each)
    pairs = [(a[name], b[name]) for rank in each for a, b in zip(rank["metrics"], one["metrics"]) for name in b]
    return {
        "same_ids": same_ids and len(one["ids"]) == 2,
        "ranks_equal": torch.equal(each[0]["weights"], each[1]["weights"]),
        "off": off,
        "metrics_off": max(abs(a - b) for a, b in pairs),
        "moved": float((one["weights"] - one["start"]).detach().abs().max()),
        "budgets": [rank["budget"] for rank in each],
    }


def steps(world, folder):
    """Two steps of every case in two ranks."""

    def all_cases():
        found = {name: two_steps(settings) for name, settings in CASES.items()}
        return found | {"out of memory": two_steps(CASES["full"], starve=True)}

    each = returned(all_cases, folder)
    for name in each[0]:
        one = two_steps(CASES.get(name, CASES["full"]))
        yield {"case": name, **compared(one, [rank[name] for rank in each])}


# ---------------------------------------------------------------- reading texts


def encoding(world, folder):
    """The same vectors, loss and counts as one process, to the bit; one memory on disk, which the first rank keeps."""
    texts = [f"the {a} {b} {c} ." for a in ("old", "young") for b in ("doctor", "child") for c in "sold hid lost it".split()]

    def read(cache):
        encoder = GraceEncoder(f"{world}/model", cache=cache, tokens_per_batch=100, device="cpu")
        first = encoder.encode(texts[:9])
        vectors = encoder.encode(texts)
        sampled = GraceEncoder(encoder.policy, temperature=1.0, tokens_per_batch=100).encode(texts)
        loss = text_loss(encoder.policy, texts, tokens_per_batch=100)
        return torch.tensor(first), torch.tensor(vectors), torch.tensor(sampled), loss, encoder.counts

    equal = lambda a, b: all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b))
    one = read(f"{folder}/cache-one")
    yield {"same": [equal(one, rank) for rank in returned(lambda: read(f"{folder}/cache"), folder)], "counts": one[-1]}
    again = returned(lambda: read(f"{folder}/cache"), folder)
    one_again = read(f"{folder}/cache")
    yield {"same": [equal(one_again, rank) for rank in again], "counts": again[1][-1]}


def scores(world, folder):
    """eval_mteb_subset.py: the same scores."""
    import synthetic_tasks

    tasks = synthetic_tasks.write_all(Path(folder) / "tasks", 0)[:2]
    given = f"--model {world}/model --data-dir {folder}/tasks --tokens-per-batch 2000 --device cpu --tasks {' '.join(tasks)}"
    evaluate = lambda out: eval_mteb_subset.main(f"{given} --cache {folder}/cache-{out} --out {folder}/{out}.json".split())
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        evaluate("one")
    ended = forked(lambda: evaluate("two"), folder)
    one, two = (json.loads(Path(f"{folder}/{out}.json").read_text()) for out in ("one", "two"))
    drop = lambda tasks: {name: {k: v for k, v in task.items() if k != "seconds"} for name, task in tasks.items()}
    yield {"codes": [code for code, _ in ended], "same": drop(one["tasks"]) == drop(two["tasks"]), "tasks": len(one["tasks"])}
    yield {"printed": [bool(text) for _, text in ended], "counts": one["texts"] == two["texts"]}


# ---------------------------------------------------------------- what stops a run


def weights_off(one, two, start):
    """How far two models are apart, and how far the first has moved, as norms over all weights."""
    a, b, s = (load_file(f"{path}/model.safetensors") for path in (one, two, start))
    assert a.keys() == b.keys()
    apart = lambda x, y: sum(float((x[name] - y[name]).pow(2).sum()) for name in x) ** 0.5
    return {"off": apart(a, b), "moved": apart(a, s)}


def second_rank(method, act, step=1):
    """In this rank, if it is the second one: `act()` before the trainer's method is called first in a step."""
    original, acted = getattr(grace.Trainer, method), []

    def acting(trainer, *given):
        if not ranks.first() and trainer.step_number == step and not acted:
            acted.append(True)
            act()
        return original(trainer, *given)

    setattr(grace.Trainer, method, acting)


def no_number():
    objective = grace.Trainer.objective

    def bad(*given):
        value, stats = objective(*given)
        return value * float("nan"), stats

    grace.Trainer.objective = bad


def raising(error):
    def act():
        raise error

    return act


def stops(world, folder):
    """What ends a run of two ranks, by its name: exit codes, what is printed, and the checkpoints that are left."""
    args = lambda out, *more: command(world, f"{folder}/{out}", "--steps 3 --device cpu --eval-every 0", *more)
    to_self = lambda number: lambda: os.kill(os.getpid(), number)

    def alone(out, *more):
        with open(f"{folder}/alone.txt", "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            grace.main(args(out, *more))

    def run(out, *more, prepare=lambda: None):
        ended = forked(lambda: (prepare(), grace.main(args(out, *more))), folder)
        saved = [os.path.basename(path) for path in checkpoints(f"{folder}/{out}")]
        said = [
            [line for line in text.splitlines() if line.strip() and "step/s" not in line and "s/step" not in line]
            for _, text in ended
        ]
        return {"run": out, "codes": [code for code, _ in ended], "said": said, "saved": saved}

    def fails(out, method, act, *more):
        return run(out, "--save-every 0", *more, prepare=lambda: second_rank(method, act))

    off = lambda out: weights_off(f"{folder}/one", f"{folder}/{out}", f"{world}/model")
    alone("one")
    # Any number of ranks resumes, sharded or not, what any other number left.
    yield run("sharded", "--shard --steps 2")
    alone("sharded", "--resume")
    yield {"run": "sharded, resumed by one", **off("sharded")}
    yield fails("killed", "update", to_self(signal.SIGKILL))
    yield run("killed", "--shard --resume")
    yield {"run": "killed, resumed sharded", **off("killed")}

    yield fails("signal", "update", to_self(signal.SIGTERM), "--shard")
    yield fails("not-finite", "update", no_number, "--shard")
    yield {"run": "shown", "files": [name for name in os.listdir(f"{folder}/not-finite") if name.startswith("not_finite")]}
    yield fails("refused", "backward", raising(GraceError("the second rank does not like this")))
    yield fails("bug", "backward", raising(KeyError("a bug")))
    yield fails("memory", "objective", raising(torch.OutOfMemoryError("CUDA out of memory")), "--shard")

    def full_disk():
        step = grace.Trainer.step

        def blocked(trainer):
            if ranks.first() and trainer.step_number == 1:
                os.remove(f"{folder}/full/metrics.jsonl")
                os.mkdir(f"{folder}/full/metrics.jsonl")
            return step(trainer)

        grace.Trainer.step = blocked

    yield run("full", "--save-every 0", prepare=full_disk)
    yield run("no-model", "--model no/such/model")
    yield run("too-many", "--batch 2 --minibatches 3")


CHECKS = {f.__name__: f for f in (steps, encoding, scores, stops)}


def main(world, *names):
    torch.set_num_threads(1)
    grace.finish_page = lambda out: None  # it takes longer than all else in a run of a few steps
    for name in names or CHECKS:
        with tempfile.TemporaryDirectory() as folder:
            for figures in CHECKS[name](world, folder):
                print(json.dumps({"check": name, **figures}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
