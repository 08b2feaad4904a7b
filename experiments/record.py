"""One run of an experiment: settings in, a small JSON record out, made once and found again by its settings.

A run is a flat dict: `trainer` (which of TRAINERS, or "none"), `world`, `seed`, `probe`, `backbone` where one experiment
has several ("toy", "given", or the name of a folder beside the given one), and any settings of config.py.
Its record holds all of it, the evaluations before and after (and after without a rationale), what the rationales are
like, the course of the training, versions, wall time and the git revision. Weights are not kept.

Records are lines of `results/WORLD.jsonl`, and of `results/real.jsonl` where the texts are real: one line per record,
in the order of their keys. A key is made from a run's settings; those at their defaults are left out of it, so a record
stays valid when config.py gains a setting. A record also has a digest of each file that was given (`Place.contents`).
"""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import zlib

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from algorithms import ALGORITHMS  # noqa: E402
from baselines import Contrastive, ForcedContrastive, PathwiseAlone, SimCSE, longest  # noqa: E402
from scores import WAYS  # noqa: E402

import grace  # noqa: E402
from config import RECIPES, Config  # noqa: E402
from evaluation.encoder import GraceEncoder, encode_texts, text_loss  # noqa: E402
from evaluation.tasks import evaluate_tasks, evaluate_triplets  # noqa: E402
from plumbing.checkpoint import sha256, write_atomically  # noqa: E402
from plumbing.data import load_rows, read_texts, read_triplets  # noqa: E402
from plumbing.report import read_metrics, versions  # noqa: E402
from policy import Policy  # noqa: E402
from pool import length_mask  # noqa: E402
from rollout import Rollouts, sample, score, token_logprobs, uniforms  # noqa: E402
from worlds import WORLDS  # noqa: E402
from worlds.make import build_world  # noqa: E402

TRAINERS = {
    "contrastive": Contrastive, "forced": ForcedContrastive, "simcse": SimCSE, "pathwise": PathwiseAlone, **ALGORITHMS,
}  # fmt: skip
UNREWARDED = ("none", "contrastive", "forced", "simcse")  # of a recipe they read the text term's weight alone
TOY = dict(batch=32, rollouts=4, lr=5e-4, lr_decay=True, infonce_temperature=0.2)  # train.sh's settings for the embedded worlds
QUICK_WORLD = dict(train=64, heldout=16, steps=5)  # built in a second
QUICK = dict(  # not varied
    batch=4, rollouts=3, steps=1, lr=1e-3, lr_decay=True, lambda_consistency=0.2, lambda_hard=0.2, pathwise=0.1, kl=0.01,
    text_weight=1.0, infonce_temperature=0.2, temperature=0.7, max_new_tokens=6,
)  # fmt: skip
REAL_TASKS = ["STSBenchmark", "STS17", "SICK-R", "Banking77Classification"]
FOLLOW = {  # instructions that a program can check, for backbones that were taught to follow any
    "Answer with the single word yes.": lambda answer: answer.strip(" .!\n").lower() == "yes",
    "Which number comes after 41? Answer with digits only.": lambda answer: answer.strip(" .\n") == "42",
    "Repeat this word three times, with spaces between: stone": lambda answer: answer.lower().split() == ["stone"] * 3,
    "Write the word HARBOUR in lower case and nothing else.": lambda answer: answer.strip(" .\n") == "harbour",
    "List three colours, separated by commas.": lambda answer: answer.count(",") == 2,
    "Write one sentence that ends with a question mark.": lambda answer: answer.strip().endswith("?"),
    "What is the capital of France? Answer in one word.": lambda answer: answer.strip(" .\n").lower() == "paris",
    "Translate into German, one word only: water": lambda answer: answer.strip(" .\n").lower() == "wasser",
}


# ---------------------------------------------------------------- where records are


def read_records(path):
    """The records of a file, `{key: record}`. Not to be changed: they are remembered as long as the file stays the same."""
    try:
        file = os.stat(path)
    except FileNotFoundError:
        return {}
    return _read_records(path, (file.st_ino, file.st_mtime_ns, file.st_size))


@functools.lru_cache(maxsize=8)
def _read_records(path, version):
    records = {}
    with open(path) as file:
        for line in file:
            try:
                record = json.loads(line)
                records[record.pop("key")] = record  # of two with one key, the later line is the newer record
            except (ValueError, KeyError, TypeError, AttributeError):
                print(f"{path}: a line is no record and is skipped: its run will be made again")
    return records


def write_record(path, key, record):
    """Put a record into its file, in place of the one that had its key.

    Of two processes that write at the same time one waits for the other, and a reader sees the file before or after.
    """
    import fcntl  # not on Windows, where records can be read all the same

    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held until the folder is closed
        records = {**read_records(path), key: record}
        lines = (json.dumps({"key": key, **records[key]}, separators=(",", ":")) + "\n" for key in sorted(records))
        write_atomically(path, "".join(lines))
    finally:
        os.close(lock)


@dataclasses.dataclass
class Place:
    """Where runs happen: on the embedded worlds, or on a model and data of one's own."""

    results: str = os.path.join(ROOT, "experiments", "results")
    worlds: str = os.path.join(ROOT, "runs")
    model: str = None
    data: str = None
    heldout: str = None
    graded: str = None
    data_dir: str = None
    plain: str = None
    settings: dict = dataclasses.field(default_factory=dict)  # on top of an experiment's own
    quick: bool = False

    def on_toy(self, run):
        """Whether a run starts from the embedded model."""
        return not self.model or run.get("backbone") == "toy"

    def start(self, run):
        """The folder, or hub id, of the given model that a run starts from."""
        name = run.get("backbone", "given")
        return self.model if name == "given" else os.path.join(os.path.dirname(self.model.rstrip("/")), name)

    def config(self, run):
        """The Config of a run, its paths aside."""
        fields = {f.name for f in dataclasses.fields(Config)}
        given = {**({} if self.model else TOY), **{k: v for k, v in run.items() if k in fields}, **self.settings}
        return Config(**(given | QUICK if self.quick else given))

    def key(self, run):
        """The name of a run's record: a digest of its settings, defaults aside."""
        defaults = {f.name: f.default for f in dataclasses.fields(Config)}
        unread = {"device", "tokens_per_batch"}
        unread |= set(RECIPES["full"]) - {"text_weight"} if run["trainer"] in UNREWARDED else set()
        settings = {k: v for k, v in dataclasses.asdict(self.config(run)).items() if v != defaults[k] and k not in unread}
        about = {k: run.get(k) for k in ("trainer", "world", "probe", "backbone")}
        about |= {"settings": settings, "quick": self.quick}
        if "backbone" not in run:
            about |= {k: getattr(self, k) for k in ("model", "data", "heldout", "graded", "plain") if getattr(self, k)}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:10]
        kind = "".join(c if c.isalnum() else "-" for c in run.get("trainer", "none").lower()).strip("-")
        return f"{kind}-{run['seed']}-{digest}"

    def file(self, run):
        """The file of a run's record: one per embedded world, and one for real texts."""
        real = self.model or self.data or "backbone" in run
        return os.path.join(self.results, f"{'real' if real else run.get('world') or 'events'}.jsonl")

    def contents(self):
        """A digest of each given file, `{"data": digest, ...}`; where it is no file, its name."""
        given = {name: getattr(self, name) for name in ("data", "heldout", "graded", "plain") if getattr(self, name)}
        about = lambda path: (path, os.path.getsize(path), os.path.getmtime(path))
        return {name: file_digest(*about(path)) if os.path.isfile(path) else path for name, path in given.items()}

    def read(self, run):
        """The record of a run, or None if there is none yet, or if it is of another model or of files that have changed."""
        record = read_records(self.file(run)).get(self.key(run))
        if not record or not self.on_toy(run) and record["backbone"] != backbone(self.start(run)):
            return None
        files = record.get("files", {})  # older records do not have them
        return record if all(files.get(name, now) == now for name, now in self.contents().items()) else None

    def write(self, run, record):
        """Keep the record of a run."""
        write_record(self.file(run), self.key(run), record)

    def world(self, run):
        """The folder of a run's world, built where it is missing."""
        world = run.get("world") or "events"
        suffix = "" if world == "events" else f"-{world}"
        out = os.path.join(self.worlds, f"{'quick' if self.quick else 'toy'}-world{suffix}-{run['seed']}")
        if not os.path.isfile(os.path.join(out, "model", "grace_config.json")):
            build_world(out, run["seed"], world=WORLDS[world], **(QUICK_WORLD if self.quick else {}))
        return out


@functools.lru_cache
def file_digest(path, size, changed):
    """A digest of a file's content, read once as long as its size and time stay the same."""
    return sha256(path)[:10]


def backbone(model):
    """What a model is called in a table."""
    return os.path.basename(model.rstrip("/"))


# ---------------------------------------------------------------- what is measured


def measure(policy, start, texts, world, plain=(), instructed=False):
    """What the policy's greedy rationales about some texts are like, and what else it can still do. `-> {name: number}`.

    world: has `named(rationale, text)`, of the text's facts the share that is named, and of those named the share that
    is true; `well_formed(rationale)`; and, if its warm start taught a second instruction, what `follow_other` needs.
    None where the texts are of no embedded world. plain: texts of another kind than those of the training.
    """
    rationales = encode_texts(policy, texts).rationales
    stats = {"distinct": len(set(rationales)) / len(set(texts))}
    stats["start_logprob"] = answers_logprob(policy, start, texts, 0.0)
    stats["answers_loss"] = -answers_logprob(start, policy, texts, 1.0)
    if world:
        recall, precision = np.mean([world.named(rationale, text) for rationale, text in zip(rationales, texts)], 0)
        stats |= {"recall": recall, "precision": precision}
        stats["well_formed"] = np.mean([world.well_formed(rationale) for rationale in rationales])
    if hasattr(world, "thinks"):
        thinking = [pair for pair in zip(rationales, texts) if world.thinks(pair[0])]
        stats["thinks"] = len(thinking) / len(texts)
        stats["true_steps"] = np.mean([world.true_steps(*pair) for pair in thinking]) if thinking else None
    if hasattr(world, "other_chats"):
        stats |= follow_other(policy, world, len(texts))
    if plain:
        stats["plain_loss"] = text_loss(policy, plain)
        stats["bare_loss"] = bare_loss(policy, plain)
    if instructed:
        helpful = reading_otherwise(policy, instruction="You are a helpful assistant.", max_new_tokens=32)
        answers = encode_texts(helpful, list(FOLLOW)).rationales
        stats["follows"] = np.mean([check(answer) for check, answer in zip(FOLLOW.values(), answers)])
    return {name: x if x is None else float(x) for name, x in stats.items()}


@torch.no_grad()
def bare_loss(policy, texts):
    """Nats per token of texts that stand alone, without a prompt: what was forgotten, whatever P(x) asks for."""
    nats = count = 0
    for text in texts:  # the first token has nothing before it that it could be predicted from
        ids = policy.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(policy.device)
        ids = ids[:, : policy.reading.max_prompt_tokens]
        hidden, _, _ = policy.prefill(ids, torch.ones_like(ids), 0)
        nats -= float(token_logprobs(policy, hidden[0, :-1], ids[0, 1:]).sum())
        count += ids.shape[1] - 1
    return nats / count


def reading_otherwise(policy, **reading):
    """The same network, reading texts with another instruction or other limits."""
    return Policy(policy.model, policy.tokenizer, dataclasses.replace(policy.reading, **reading), policy.dtype)


@torch.no_grad()
def answers_logprob(writer, reader, texts, temperature):
    """How likely one policy finds what another one writes about texts: the mean log-probability per token.

    Of the policy's greedy answers under the start: is what it says still what the start would say? Of the start's own
    answers, drawn at temperature 1, under the policy: is what the start could say still there? What that falls short
    of the start's own figure is KL(start || policy) per token: what was forgotten. It is the same draws each time.
    """
    total = count = 0
    for i in range(0, len(texts), 64):
        prompts = writer.prompts(texts[i : i + 64])
        shape = len(prompts.ids), 1, writer.reading.max_new_tokens
        chance = uniforms([0, i], *shape, device=writer.device) if temperature else None
        rollouts = sample(writer, prompts, 1, temperature, chance)
        total += float((score(reader, rollouts).logprobs * rollouts.mask).sum())
        count += int(rollouts.mask.sum())
    return total / count


@torch.no_grad()
def follow_other(policy, world, n):
    """How well the policy follows an instruction of its warm start that no reward touched. `-> {name: number}`.

    world: has `other_instruction` and `other_chats(n, rng, held_out=True) -> [(text, answer)]`. The loss is per token of
    the right answers, end tokens included; right is a greedy answer that equals them.
    """
    other = reading_otherwise(policy, instruction=world.other_instruction)
    texts, answers = (list(part) for part in zip(*world.other_chats(n, random.Random(0), held_out=True)))
    given = answered(other, texts, answers)
    logprobs = score(other, given).logprobs
    right = np.mean([a == b for a, b in zip(encode_texts(other, texts).rationales, answers)])
    return {"other_loss": -float(logprobs.sum() / given.mask.sum()), "other_right": right}


def answered(policy, texts, answers):
    """Given answers, each with an end token, as the `Rollouts` that `score` reads; one per text."""
    prompts, tokenizer = policy.prompts(texts), policy.tokenizer
    rows = [[*tokenizer(answer, add_special_tokens=False)["input_ids"], int(policy.end_ids[0])] for answer in answers]
    N, T, D = len(rows), max(map(len, rows)), policy.head.weight.shape[1]
    ids = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=policy.device)[:, None]
    mask = length_mask(torch.tensor([len(row) for row in rows], device=policy.device), T).long()[:, None]
    unknown = (torch.zeros(N, 1, n, device=policy.device) for n in (T, D))  # nobody drew them
    finished = torch.ones(N, 1, dtype=torch.bool, device=policy.device)
    return Rollouts(prompts.ids, prompts.mask, prompts.counted, ids, mask, *unknown, finished, None, prompts.n_shared)


def budgets(policy, heldout, limits):
    """Figure 4: held-out retrieval and milliseconds per text, by the longest rationale allowed."""
    texts, rows = [row["query"] for row in heldout], []
    for limit in (0, *limits):
        short = reading_otherwise(policy, max_new_tokens=limit or 1)
        scores = evaluate_triplets(short, heldout, rationale=limit > 0)
        start = time.perf_counter()
        encode_texts(short, texts, rationale=limit > 0)
        ms = 1000 * (time.perf_counter() - start) / len(set(texts))
        rows.append({"limit": limit, "ndcg_at_10": scores["ndcg_at_10"], "finished": scores.get("finished"), "ms": ms})
    return rows


def ladder(policy, folder, rationale=True, rows=128):
    """nDCG@10 by the number of steps in a walk, on a town's held-out files. `-> {steps: score}`."""
    files = sorted(glob.glob(os.path.join(folder, "data", "heldout-steps-*.jsonl")))
    rungs = {re.search(r"(\d+)\.jsonl$", file)[1]: read_triplets(file)[:rows] for file in files}
    return {n: evaluate_triplets(policy, triplets, rationale=rationale)["ndcg_at_10"] for n, triplets in rungs.items()}


@torch.no_grad()
def forced(policy, start, folder):
    """nDCG@10 of held-out retrieval where the policy reads, behind each text, the longest of eight answers of the start."""

    def encode(texts):
        parts = (longest(start, texts[i : i + 128], [0, i]) for i in range(0, len(texts), 128))
        return torch.cat([score(policy, part).embeddings[:, 0] for part in parts]).cpu().numpy()

    return evaluate_tasks(encode, ["ToyRetrieval"], os.path.join(folder, "tasks"))["ToyRetrieval"]["main_score"]


def hashed_words(texts, D=512):
    """Counts of words, each hashed to one of D places: what needs no model at all. `-> [n, D]`."""
    vectors = np.full((len(texts), D), 1e-3, np.float32)
    for row, text in zip(vectors, texts):
        for word in text.lower().split():
            row[zlib.crc32(word.encode()) % D] += 1
    return vectors


def real_tasks(encode, place):
    """Main scores of real tasks. `-> {task: score}`."""
    names = REAL_TASKS[:2] if place.quick else REAL_TASKS
    return {task: scores["main_score"] for task, scores in evaluate_tasks(encode, names, place.data_dir).items()}


@functools.cache
def revision():
    """The git revision, with a + if the working tree differs from it."""
    git = lambda *command: subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", "*.py") else "")


# ---------------------------------------------------------------- a run


def make(run, place):
    """Train and measure one run, and keep its record. Returns the record's key and the seconds it took."""
    began, on_toy = time.time(), place.on_toy(run)
    folder = place.world(run) if on_toy else None
    model = f"{folder}/model" if on_toy else place.start(run)
    files = dict(model=model, data=place.data, heldout=place.heldout, graded=place.graded)
    if not place.data:
        names = {"data": "texts" if run.get("mode") == "unsupervised" else "train", "heldout": "heldout", "graded": "graded"}
        files |= {name: f"{folder}/data/{file}.jsonl" for name, file in names.items()}
    config = dataclasses.replace(place.config(run), **files)
    with tempfile.TemporaryDirectory() as out, open(os.path.join(out, "log.txt"), "w") as log:
        config = dataclasses.replace(config, out=os.path.join(out, "run"))
        _, heldout, graded = load_rows(config)
        start = Policy.load(config.model, config.device, config.dtype, **config.reading)
        if run["trainer"] == "none":
            policy, summary = start, {"before": evaluate_triplets(start, heldout, graded), "seconds": 0.0}
            summary |= {"after": summary["before"], "after_without_rationale": evaluate_triplets(start, heldout, graded, False)}
        else:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                summary = grace.train(config, TRAINERS[run["trainer"]])
            policy = Policy.load(config.out, config.device, config.dtype)
        record = {
            "run": run,
            "backbone": "toy" if on_toy else backbone(model),
            "files": place.contents(),
            "config": {k: v for k, v in dataclasses.asdict(config).items() if k not in (*files, "out")},
            **{name: summary[name] for name in ("before", "after", "after_without_rationale")},
            **course(config),
        }
        texts = [row["query"] for row in heldout]
        plain = [row["text"] for row in read_texts(place.plain)] if place.plain else []
        world = WORLDS[run.get("world") or "events"] if on_toy and not place.data else None
        for moment, which in (("before", start), ("after", policy)):
            record[moment] = record[moment] | measure(which, start, texts, world, plain, instructed=not on_toy)
        if run.get("probe") in ("captions", "captions tasks", "search"):
            record["rationales"] = []  # the texts' licence forbids handing them on
        if run.get("probe") == "captions":
            from truth import add_captions  # it stands on this file

            add_captions(record, start, policy, place)
        if run.get("probe") == "budgets":
            limits = [n for n in (1, 2, 3, 4, 6, 8, 12, 20, 24, 28, 32, 40) if n <= policy.reading.max_new_tokens]
            record["budgets"] = budgets(policy, heldout, limits[::4] if place.quick else limits)
        if run.get("probe") == "ladder":
            record["ladder"] = {way: ladder(policy, folder, way == "after") for way in WAYS}
        if hasattr(world, "thinks") and run["trainer"] in UNREWARDED:
            record["after"]["forced"] = forced(policy, start, folder)
        if run.get("probe") in ("tasks", "captions tasks"):
            encode = {way: GraceEncoder(policy, rationale=way == "after").encode for way in WAYS}
            record["tasks"], record["tasks_alone"] = (real_tasks(encode[way], place) for way in WAYS)
            record["tasks_words"] = real_tasks(hashed_words, place) if run["trainer"] == "none" else None
        if run.get("probe") == "captions tasks":
            from truth import longer

            record["longer"] = {way: longer(encode[way], heldout) for way in WAYS}
    record |= {"train_seconds": summary["seconds"], "seconds": time.time() - began, "revision": revision()}
    record["versions"] = versions()
    place.write(run, rounded(record))
    return place.key(run), record["seconds"]


def course(config):
    """From a run's files: held-out figures along the training, a trace of its metrics, and three texts' rationales."""
    if not os.path.isdir(config.out):
        return {"curve": [], "trace": [], "rationales": []}
    metrics = [line for _, line in read_metrics(os.path.join(config.out, "metrics.jsonl"))]
    every = max(1, config.steps // 12)
    curve = [{k.removeprefix("heldout_"): v for k, v in m.items() if k == "step" or k.startswith("heldout_")} for m in metrics]
    kept = ("step", "reward", "length", "distinct", "cosine", "effective_rank", "loss", "grad_norm", "sample_s", "step_s")
    trace = [
        {k: v for k, v in m.items() if k in kept or k.endswith("_std")}
        for m in metrics
        if m["step"] == 1 or m["step"] % every == 0
    ]
    with open(os.path.join(config.out, "rationales.md")) as file:
        blocks = file.read().split("\n**")[1:4]
    rationales = []
    for block in blocks:
        text, _, table = block.partition("**\n")
        cells = [line.strip("| ").split(" | ", 1) for line in table.splitlines() if line.startswith("| ")][2:]
        rationales.append({"text": text, "written": [[int(cell[0]), cell[1] if len(cell) > 1 else ""] for cell in cells]})
    return {"curve": [c for c in curve if len(c) > 1], "trace": trace, "rationales": rationales}


def rounded(x, digits=5):
    """Every float to so many significant digits, so that records stay small and readable."""
    if isinstance(x, dict):
        return {k: rounded(v, digits) for k, v in x.items()}
    if isinstance(x, list):
        return [rounded(v, digits) for v in x]
    return float(f"{x:.{digits}g}") if isinstance(x, float) else x
