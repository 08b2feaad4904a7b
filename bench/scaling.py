"""One training step on N ranks as a timeline: what each phase costs, and who waits for whom. docs/scaling.md has its tables.

    python bench/scaling.py                                                       the tables
    python bench/scaling.py --check                                               against a measured step of one process
    torchrun --standalone --nproc-per-node 2 bench/scaling.py --check             and of two

A phase is counted, not measured: operations of matrix products, bytes of memory and bytes on the wire, each divided by a
rate of the `Machine`. Ranks work by themselves and meet twice, when rollouts are gathered and when gradients are summed;
there the early ones wait for the last (`timeline`). --check measures this machine's rates and a real step, and compares.

Shapes: N ranks, G groups of K rollouts (B per trained role), T tokens, P prompt positions, D hidden size, V vocabulary.
"""

import argparse
import os
import statistics
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from common import copy_rate, machine, matmul_rate
from step import make_trainer

from plumbing import ranks

ROLLOUT = 8 + 8 + 4  # bytes per token that ranks tell one another: id, mask, log-probability
PASSES = 3  # of the network in an update's forward: the shared instruction, the prompts, the rationales
LOGITS_DRAWN, LOGITS_SCORED = 8, 24  # how often a token's V logits are read or written, in float32


@dataclass
class Model:
    name: str
    parameters: float
    layers: int
    hidden: int
    keys: int  # channels of the keys of a layer; the values have as many
    vocabulary: int

    def forward(self, tokens, context):
        """Operations of one pass over so many tokens, without the head."""
        body = self.parameters - self.vocabulary * self.hidden
        return tokens * (2 * body + 4 * self.layers * self.hidden * context)

    def head(self, tokens):
        return 2 * tokens * self.vocabulary * self.hidden


@dataclass
class Machine:
    products: float  # operations per second, of the compute type
    float32: float  # the same in IEEE float32, for the reward
    memory: float  # bytes per second
    link: float  # bytes per second of an all-reduce within a node, per rank
    network: float  # and between nodes
    gather: float  # bytes per second at which a rank gets the others' rollouts
    latency: float  # seconds per message
    launch: float  # host seconds per layer and pass
    launch_decoding: float  # the same per decoding step, a captured graph on a GPU
    weight: int = 2  # bytes per weight and key while sampling
    node: int = 8  # ranks per node
    overlap: bool = True  # memory, products and launches at the same time; on a CPU they take turns

    def seconds(self, *costs):
        return np.maximum.reduce(costs) if self.overlap else sum(costs)


@dataclass
class Job:
    batch: int
    ranks: int
    rollouts: int = 8
    prompt: int = 128
    roles: int = 2  # that are trained; one more is sampled once per text, as an anchor
    budget: int = 32768  # --tokens-per-batch
    kl: bool = True
    split_reward: bool = False  # what the last section changes: each rank rewards its own rows


# ---------------------------------------------------------------- what each phase costs a rank


def sampling(model, machine, job, lengths):
    """Seconds to write rationales of these lengths `[G, K]`: a prefill, then a step per token of the longest."""
    if not lengths.size:
        return 0.0
    G, t = len(lengths), np.arange(lengths.max())
    alive = (lengths.ravel() > t[:, None]).sum(1)  # [T]: rows that still write
    per_token = 2 * model.layers * model.keys * machine.weight  # bytes of keys and values
    read = model.parameters * machine.weight + per_token * (G * job.prompt + alive * t)
    read = read + LOGITS_DRAWN * 4 * model.vocabulary * alive
    products = model.forward(alive, job.prompt + t) + model.head(alive)
    prefill = model.forward(G * job.prompt, job.prompt / 2) / machine.products
    steps = machine.seconds(read / machine.memory, products / machine.products, machine.launch_decoding * model.layers + 0 * t)
    return prefill + float(steps.sum())


def micro_batches(costs, budget):
    """How many there are, filled as `grace.Trainer.micro_batches` does: `[G]` padded tokens."""
    count, inside = 0, 0
    for cost in np.sort(costs):
        if inside and (inside + 1) * cost > budget:
            count, inside = count + 1, 0
        inside += 1
    return count + (inside > 0)


def updating(model, machine, job, lengths):
    """Seconds for the gradient of groups `[G, K]`, each padded to its longest; the reference reads them, too."""
    if not lengths.size:
        return 0.0
    written = job.rollouts * lengths.max(1)  # [G]
    context = job.prompt + lengths.max(1) / 2
    once = float(model.forward(written, context).sum()) + model.forward(len(lengths) * job.prompt, job.prompt / 2)
    head = model.head(float(written.sum()) + len(lengths) * job.prompt)  # the prompt's own tokens: the text term
    products = (3 + job.kl) * once + (4 + job.kl) * head  # backward is twice forward; the head runs once more
    micro = micro_batches(written + job.prompt, job.budget)
    launches = micro * PASSES * model.layers * machine.launch * (3 + job.kl)
    logits = LOGITS_SCORED * 4 * model.vocabulary * float(written.sum())
    return float(machine.seconds(products / machine.products, logits / machine.memory, launches))


def rewarding(model, job):
    """Operations of the reward and its gradient: per trained role a product of B K rows with B K columns, four times over."""
    rows = job.batch * job.rollouts / (job.ranks if job.split_reward else 1)
    return 4 * job.roles * 2 * rows * job.batch * job.rollouts * model.hidden


def gathered(model, job, longest):
    """Bytes of everybody's rollouts, which every rank gets; the anchors' as well."""
    rollouts = job.batch * (job.roles * job.rollouts + 1)
    return rollouts * (ROLLOUT * longest + 4 * model.hidden)


def reduced(model, job):
    """Bytes that a rank sends, and receives, to sum float32 gradients in a ring."""
    return 2 * (job.ranks - 1) / job.ranks * 4 * model.parameters


def sharded(model, job, micro):
    """The same with `--shard`: per micro-batch weights gathered for each pass and its backward pass, gradients scattered."""
    gathers = PASSES * (2 + job.kl)
    return (job.ranks - 1) / job.ranks * 4 * model.parameters * micro * (gathers + 1)


# ---------------------------------------------------------------- the timeline


def timeline(model, machine, job, lengths, anchors):
    """One step, as `[(phase, starts [N], ends [N])]`. lengths `[G, K]` of the trained roles' rationales, anchors `[B, 1]`.

    Groups are dealt out to ranks like cards. "wait" is the time from a rank's arrival at a meeting to that of the last.
    """
    N, clock, spans = job.ranks, np.zeros(job.ranks), []
    shares = [lengths[rank::N] for rank in range(N)]

    def work(phase, seconds):
        nonlocal clock
        after = clock + np.array(seconds)
        spans.append((phase, clock, after))
        clock = after

    def meet(phase, seconds):
        work("wait", clock.max() - clock)
        work(phase, seconds)

    work("sample", [sampling(model, machine, job, share) for share in shares])
    meet("gather", gathered(model, job, lengths.max()) / machine.gather if N > 1 else 0.0)
    work("sample", [sampling(model, machine, job, anchors[rank::N]) for rank in range(N)])
    meet("gather", machine.latency * (N > 1))  # their few bytes are counted above
    work("reward", rewarding(model, job) / machine.float32)
    work("update", [updating(model, machine, job, share) for share in shares])
    nodes = -(-N // machine.node)
    wire = reduced(model, job) / (machine.link if nodes == 1 else machine.network)
    meet("reduce", wire + 2 * machine.latency * (min(N, machine.node) + nodes - 2))
    work("optimizer", model.parameters * (28 + 6) / machine.memory)  # AdamW, and the copy to sample from
    return spans


def totals(spans):
    """Seconds per phase, the mean over ranks, and of the whole step: `{phase: seconds}`; the phases add up to the step."""
    seconds = {}
    for phase, starts, ends in spans:
        seconds[phase] = seconds.get(phase, 0.0) + float((ends - starts).mean())
    return seconds | {"step": float(spans[-1][2].max())}


def draw_lengths(G, K, T=256, seed=0):
    """Rationale lengths `[G, K]`: log-normal around T / 2, cut at T, the more alike within a group."""
    rng = np.random.default_rng(seed)
    x = T / 2 * np.exp(0.35 * rng.standard_normal((G, 1)) + 0.35 * rng.standard_normal((G, K)))
    return np.clip(x, 1, T).astype(int)


# ---------------------------------------------------------------- the tables

MODELS = [
    Model("0.5 B", 494e6, 24, 896, 128, 151936),
    Model("3 B", 3.09e9, 36, 2048, 256, 151936),
    Model("7 B", 7.62e9, 28, 3584, 512, 152064),
]
# A card that reaches 40 % of an H100's 989 Tflop/s, 67 Tflop/s (float32) and 3.35 TB/s; NVLink, and 400 Gbit/s per card.
H100 = Machine(
    products=400e12, float32=27e12, memory=1.34e12, link=300e9, network=40e9, gather=1e9, latency=20e-6,
    launch=3e-4, launch_decoding=2e-5,
)  # fmt: skip
PHASES = ("sample", "wait", "gather", "reward", "update", "reduce", "optimizer")


def run(model, job, card=H100):
    lengths, anchors = draw_lengths(job.roles * job.batch, job.rollouts), draw_lengths(job.batch, 1, seed=1)
    return totals(timeline(model, card, job, lengths, anchors))


def show(title, jobs, card=H100, models=MODELS):
    """A table of seconds per phase, a row per model and job, and what is lost against the first job."""
    print(f"\n{title}\n\n| model | GPUs | B | {' | '.join(PHASES)} | **step** | instances/s per GPU | longest |")
    print("| --- " + "| ---: " * (len(PHASES) + 4) + "| --- |")
    for model in models:
        for job in jobs:
            seconds = run(model, job, card)
            cells = [f"{seconds[phase]:.2f}" for phase in PHASES] + [f"**{seconds['step']:.2f}**"]
            cells += [f"{job.batch / job.ranks / seconds['step']:.2f}", max(PHASES, key=seconds.get)]
            print(f"| {model.name} | {job.ranks:,} | {job.batch:,} | {' | '.join(cells)} |")


def show_counts(jobs):
    """What a rank computes, reads and sends in a step."""
    names = "sampling, TB read", "update, Pflop", "similarity, Pflop", "gather, GB", "all-reduce, GB", "`--shard`, GB"
    print(f"\n| model | GPUs | B | {' | '.join(names)} |\n| --- " + "| ---: " * 8 + "|")
    for model in MODELS:
        for job in jobs:
            lengths = draw_lengths(job.roles * job.batch, job.rollouts)[:: job.ranks]
            reading, computing = replace(H100, products=np.inf, launch_decoding=0.0), replace(H100, memory=np.inf, launch=0.0)
            cells = [f"{sampling(model, reading, job, lengths) * H100.memory / 1e12:.2f}"]
            cells += [f"{updating(model, computing, job, lengths) * H100.products / 1e15:.2f}"]
            cells += [f"{rewarding(model, job) / 1e15:.3f}"]
            micro = micro_batches(job.prompt + job.rollouts * lengths.max(1), job.budget)
            wire = gathered(model, job, 256), reduced(model, job), sharded(model, job, micro)
            cells += [f"{x / 1e9:.2f}" for x in wire]
            print(f"| {model.name} | {job.ranks:,} | {job.batch:,} | {' | '.join(cells)} |")


def tables():
    weak = [Job(8 * N, N) for N in (8, 64, 1024)]
    strong = [Job(512, N) for N in (8, 64, 1024)]
    print("What one rank computes, reads and sends in a step, weak scaling:")
    show_counts(weak)
    show("Weak scaling, eight instances per GPU, seconds:", weak)
    show("Strong scaling, 512 instances, seconds:", strong)
    better = [replace(job, split_reward=True) for job in weak]
    title = "Weak scaling again: rows of the reward shared out, rollouts gathered by the cards' own network, seconds:"
    show(title, better, replace(H100, gather=H100.network))


# ---------------------------------------------------------------- against a measured step


def reduce_rate(n=2**22, repeats=5):
    """Bytes per second that a rank sends while gradients are summed, and the seconds of a tiny sum."""
    if ranks.size() == 1:
        return np.inf, 0.0
    times = {}
    for count in (1, n):
        x, taken = torch.zeros(count), []
        for _ in range(repeats + 1):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(x)
            taken.append(time.perf_counter() - start)
        times[count] = statistics.median(taken[1:])
    return 2 * (ranks.size() - 1) / ranks.size() * 4 * n / (times[n] - times[1]), times[1]


def forward_seconds(policy, rows, repeats=9):
    """A decoding step of so many rows and the library's own cache."""
    prompts = policy.prompts(["x"] * rows)
    with torch.no_grad():
        decoder = policy.decoder(policy.prefill(prompts.ids, prompts.mask, prompts.n_shared)[2], prompts.mask, 1)
        token, times = torch.full((rows,), 7), []
        for _ in range(repeats):
            start = time.perf_counter()
            decoder.step(token)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def check(args):
    """This machine's rates, while every rank measures at the same time; a real step; and the timeline of the same step."""
    flags = argparse.Namespace(
        model=None, shape=args.shape, vocab=None, hidden=None, max_new_tokens=48, prompt_tokens=200, device="cpu",
        dtype="float32", batch=args.batch, rollouts=8, train_roles="query,positive", mode="supervised", data=None,
    )  # fmt: skip
    trainer = make_trainer(flags, [])
    policy, config = trainer.policy, trainer.policy.model.config
    parameters = sum(p.numel() for p in policy.model.parameters())
    head = config.hidden_size // config.num_attention_heads
    keys = config.num_key_value_heads * head
    model = Model(args.shape, parameters, config.num_hidden_layers, config.hidden_size, keys, config.vocab_size)
    everyone = lambda x: statistics.mean(ranks.exchange(x))
    launch = everyone(forward_seconds(policy, 1)) / model.layers
    products, memory = everyone(matmul_rate()), everyone(copy_rate())
    link, latency = reduce_rate()
    card = Machine(products, products, memory, link, link, link, latency, launch, launch, weight=4, overlap=False)
    job = Job(args.batch, ranks.size(), prompt=200, budget=trainer.config.tokens_per_batch)
    measured, parts = [], []
    for _ in range(args.steps + 1):
        ranks.exchange(None)
        start = time.perf_counter()
        metrics = trainer.step()
        measured.append(time.perf_counter() - start)
        parts.append(metrics["sample_s"])
    lengths = np.full((2 * args.batch, 8), 48)
    seconds = totals(timeline(model, card, job, lengths, np.full((args.batch, 1), 48)))
    real, sampled = everyone(statistics.median(measured[1:])), everyone(statistics.median(parts[1:]))
    print(f"{machine()}; {ranks.size()} processes on {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"rates: {products / 1e9:.1f} Gflop/s, memory {memory / 1e9:.1f} GB/s, all-reduce {link / 1e9:.2f} GB/s,", end=" ")
    print(f"{launch * 1e3:.2f} ms per layer")
    print(f"{'':10}{'simulated':>10}{'measured':>10}{'deviation':>11}")
    for name, ours, theirs in (
        ("sampling", seconds["sample"], sampled),
        ("the rest", seconds["step"] - seconds["sample"], real - sampled),
        ("step", seconds["step"], real),
    ):
        print(f"{name:10}{ours:10.3f}{theirs:10.3f}{ours / theirs - 1:11.0%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure this machine and a real step, and compare")
    parser.add_argument("--shape", default="6.6m")
    parser.add_argument("--batch", type=int, default=4, help="instances of the measured step [4]")
    parser.add_argument("--steps", type=int, default=5, help="measured after one to warm up [5]")
    args = parser.parse_args()
    ranks.start()
    check(args) if args.check else tables()


if __name__ == "__main__":
    main()
