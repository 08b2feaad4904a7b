"""GRACE: a language model taught by reward to write rationales that make good embeddings.

For each text x the policy writes a rationale r ~ pi(. | P(x)); the mean of its hidden states over
text and rationale is the embedding h. How well the embeddings of a batch tell right pairs from
wrong ones is not a loss but the *reward* of the rationales, and a clipped GRPO update teaches the
policy. One training step is Algorithm 1, in five numbered phases: see `Trainer.step`. The loop around
the steps is `train`.

    python grace.py --model DIR_OR_HUB_ID --data FILE_OR_HUB_ID --out DIR      train
    python grace.py status DIR                                                 where a run is, and signs of trouble
    python grace.py report DIR                                                 a page about a run, finished or not
    python grace.py explain --model DIR_OR_HUB_ID "text a" "text b"            their cosine, word by word
    torchrun --standalone --nproc-per-node N grace.py …the same flags…         N ranks take the step that one process takes

Both halves of the gradient. The objective is the expected reward of what the policy writes,

    J(theta) = E[R_theta(y)],  y ~ pi_theta,

and theta appears in it twice: y is drawn from the policy, and R is computed from the policy's own
hidden states. So, for any one text, writing the expectation as a sum over rationales,

    grad J = sum_y grad(pi_theta(y)) R_theta(y)   +  sum_y pi_theta(y) grad(R_theta(y))
           = E[R_theta(y) grad log pi_theta(y)]   +  E[grad R_theta(y)]
             the score-function term: GRPO           the pathwise term

(Schulman et al. 2015, stochastic computation graphs). Eq. 19 keeps the first alone. The second is
nearly free: take g = dR/dh at the embeddings the sampler captured, a graph over [B, K, D] that
never touches the network, and add -c * sum(g . h(theta)) to the loss. The update's forward pass
computes h(theta) anyway, and since g is fixed the term splits over micro-batches exactly (as in
GradCache, Gao et al. 2021). `--pathwise c` weights it; 0 is the paper. `--prompt-weight c` adds such a term for what the
prompt embeds without a rationale, in both recipes 0: it teaches the same checkpoint to embed without writing, too.

When is the sum exact? Where a rollout's reward depends on its own embedding alone: fixed anchors (Eq. 12), no
consistency term, and under the paper's reward lambda2 = 0, because Eq. 15 is the same for a whole group and so enters
g but no advantage. Then, with log-probabilities summed over tokens (`--no-length-normalize`) and c = (K-1)/K, the sum
is (K-1)/K times the gradient: a group mean that includes the rollout itself shrinks the first term by that factor.
(Anchors depend on theta as well; both terms hold them constant.) Where rollouts enter each other's rewards, as
queries and positives do here, an advantage credits a rollout with its own reward only, while g covers all of them;
there, c only weights the two terms against each other.

Departures from the paper's equations, each a setting, all undone by `--recipe paper`. (Five differences from the
released run remain. Four have flags: its limit, `--max-new-tokens 2048`; its wording, `--instruction`; its four optimizer
steps per batch, `--minibatches 4`; its sampled rationales when texts are embedded, the evaluator's `--temperature 1`.
Instances that share a text stay out of each other's negatives always.)

1. The reward is InfoNCE instead of Eq. 13 and 15, which cancel in the advantage (reward.py).
2. The pathwise term.
3. Queries are rolled out and trained like positives; in Eq. 12 they are fixed anchors.
4. Log-probabilities are summed over tokens, as in Eq. 19; Eq. 8 takes their mean. With sums, one c fits rationales of
   every length, and a c below 1 makes the policy rely on what it writes.
5. Two terms keep the policy close to where it started. The text term is plain language-model training on the training
   texts, whose hidden states the update computes anyway (like the pre-training text mixed in by Ouyang et al. 2022). A
   light KL term on the rationales' tokens keeps words to their old meanings.
6. Rollouts are drawn, and scored, at temperature 0.7 instead of 1, closer to the greedy rationale that is used in the
   end. A word that is right when greedy but often wrong when sampled is punished for the samples, and the policy then
   stops writing such words.
7. The length penalty is relative (reward.py).

Shapes: B instances, K rollouts per group, M hard negatives, N groups (B per trained role), T tokens,
D hidden size.
"""

import sys
import time

import numpy as np
import torch
import transformers

import reward as rewards
import similarity
from config import parse
from evaluation.encoder import GraceEncoder, encode_texts, text_loss  # noqa: F401 (`from grace import GraceEncoder`)
from evaluation.explain import explain
from evaluation.page import finish_page, report
from evaluation.probe import record
from evaluation.signs import describe
from evaluation.tasks import evaluate_heldout
from plumbing import ranks
from plumbing.data import load_rows
from plumbing.errors import GraceError, finite, first_line
from plumbing.guard import finished_summary, inspected, on_every_rank, save_batch
from plumbing.report import peak_memory_gb, show_summary
from plumbing.run import Run
from plumbing.status import status
from policy import load_policies
from rollout import make_batch, roll_out, score
from speed.shard import newest, prepare

# ---------------------------------------------------------------- advantage and objective


def advantages(rewards, normalize=False):
    """Eq. 18: the reward less the group's mean. `[N, K] -> [N, K]`, each row summing to 0.

    normalize: also divided by the group's standard deviation (Eq. 7). Where rewards are cosines that
    blows a spread of 5e-4, mostly noise, up to advantages of about 1, so it is off by default.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if normalize:
        centred = centred / (centred.pow(2).mean(1, keepdim=True).sqrt() + 1e-6)
    return centred


def masked_mean(x, mask):
    """The mean over a rationale's own tokens. `[N, K, T] x 2 -> [N, K]`."""
    return (x * mask).sum(-1) / mask.sum(-1)


def clipped_objective(logprobs, old_logprobs, advantage, mask, clip_eps, length_normalize=True, clip_high=None):
    """Eq. 8, to be maximised. `[N, K, T], [N, K, T], [N, K], [N, K, T] -> [N, K]`.

    With one optimizer step per batch the ratio is 1 everywhere, nothing is clipped, and the gradient is
    Eq. 19's. From the second step on, `min` takes a token out of the gradient once its ratio has
    moved past 1 +- eps in the direction the advantage wants; a move the other way is never clipped.
    clip_high: another eps upwards. length_normalize=False: the sum over tokens, not their mean.
    """
    ratio = (logprobs - old_logprobs).exp()
    A = advantage[..., None]
    token = torch.minimum(ratio * A, ratio.clamp(1 - clip_eps, 1 + (clip_high or clip_eps)) * A)  # [N, K, T]
    return masked_mean(token, mask) if length_normalize else (token * mask).sum(-1)


def kl_k3(logprobs, reference, mask):
    """Schulman's k3 estimator of KL(policy || reference), mean over tokens. `[N, K, T] x 3 -> [N, K]`.

    Its value and its gradient belong to two different divergences. With r = reference / policy the value r - 1 - log r has the
    mean KL(policy || reference); minimised on the policy's own samples, its gradient is E[(1 - r) grad log pi], which
    is that of KL(reference || policy). So the term keeps likely what the reference finds likely.
    """
    log_ratio = reference - logprobs
    return masked_mean(log_ratio.exp() - 1 - log_ratio, mask)


def kl_k2(logprobs, reference, mask):
    """Half the squared log-ratio, mean over tokens: the gradient of KL(policy || reference). `[N, K, T] x 3 -> [N, K]`.

    Its gradient is E[log(pi / reference) grad log pi]. Where k3 pulls by at most 1 per token, this pull grows with
    how unlikely the reference finds the token, so it stops what the starting policy would never write.
    """
    return masked_mean((logprobs - reference).pow(2) / 2, mask)


def pathwise(g, h):
    """The second half of the gradient, to be maximised. `[N, K, D] x 2 -> [N, K]`.

    g is the reward's gradient at the embeddings that the sampler captured, a constant; h are the same embeddings from
    the update's forward pass, where they depend on theta. Not the reward itself, but a number with its gradient.
    """
    return (g * h).sum(-1)


# ---------------------------------------------------------------- Algorithm 1


def judge(embeddings, finished, twins, config):
    """Phase 3: rewards of the trained rollouts, their components, and the rewards' gradient.

    Returns R `[N, K]`, `{component: [N, K]}` before weighting, and g = d(sum R)/dh `[N, K, D]`: the direction
    in which the rewards would rise if the embeddings could move freely. Roles that are not trained are constants.
    """
    # Leaves of a graph of their own: [B, K, D] is all that this gradient ever touches.
    leaves = {role: x.detach().requires_grad_(role in config.roles) for role, x in embeddings.items()}
    if config.reward == "paper":
        by_role = [rewards.paper_components(leaves, twins)]
    else:
        by_role = [rewards.infonce_components(leaves, role, config.infonce_temperature, twins) for role in config.roles]
    components = {name: torch.cat([c[name] for c in by_role]) for name in by_role[0]}
    R = rewards.scaled(rewards.total(components, config.lambda_consistency, config.lambda_hard), config.tau)
    R = rewards.length_penalty(R, finished, config.gamma, config.relative_length_penalty)
    # Of the sum, not of each rollout's own reward: an embedding also moves the rewards of the others it stands beside.
    g = torch.autograd.grad(R.sum(), [leaves[role] for role in config.roles])
    g = torch.cat([x.flatten(0, -3) for x in g])
    return R.detach(), {name: x.detach() for name, x in components.items()}, g


class Trainer:
    """The policy, its optimizer and its data: what a training step needs and what a resumed run restores."""

    def __init__(self, policy, reference, rows, config):
        self.policy, self.reference, self.rows, self.config = policy, reference, rows, config
        self.sampler = prepare(policy, reference, config)
        self.optimizer = torch.optim.AdamW(policy.model.parameters(), config.lr, weight_decay=config.weight_decay, fused=True)
        self.step_number = 0
        # Token budgets; halved when the device runs out of memory.
        self.sample_tokens, self.tokens_per_batch = config.sample_tokens, config.tokens_per_batch
        similarity.kernel = config.kernel

    def next_rows(self):
        """The next B rows of a stream of shuffled passes over the data, a function of seed and step."""
        n, B = len(self.rows), self.config.batch
        at = np.arange(self.step_number * B, (self.step_number + 1) * B)
        order = {k: np.random.default_rng([self.config.seed, k]).permutation(n) for k in set(at // n)}
        return [self.rows[order[i // n][i % n]] for i in at]

    def step(self):
        """One step of Algorithm 1. Returns its metrics."""
        policy, config, start = self.policy, self.config, time.perf_counter()
        # 1. A batch of instances.
        batch = make_batch(self.next_rows(), anchored=config.reward == "paper")
        batch.twins = batch.twins.to(policy.device)
        # 2. Rationales from the current policy, and the embeddings that come with them (Eq. 9 to 12).
        batch.rollouts, batch.embeddings, batch.prompts = rollouts, *_ = self.sample(batch.texts)
        sampled = time.perf_counter()
        # 3. What each rationale is worth (Eq. 13 to 17), and the reward's gradient at its embedding.
        R, components, g = judge(batch.embeddings, rollouts.finished, batch.twins, config)
        if config.prompt_weight:  # the same for the prompts alone: one more column of g, [N, K + 1, D]
            ended = torch.ones_like(rollouts.finished[:, :1])  # there is no rationale that could be too long
            g = torch.cat([g, judge(batch.prompts, ended, batch.twins, config)[2]], 1)
        # 4. Better or worse than the other rationales of the same text (Eq. 18).
        A = self.advantage(R, batch)
        # 5. The clipped update (Eq. 8, 19), with the pathwise term.
        figures = {"tokens": rollouts.mask.sum(-1), "reward": R, "advantage": A, **components}
        with inspected(self.step_number + 1, config.out, lambda path: self.save_batch(path, batch, figures)):
            finite("a reward or its gradient", R, g)
            learned = self.update(rollouts, A, g)
        self.step_number += 1
        done = time.perf_counter()
        metrics = {"step": self.step_number, **describe(rollouts, R, components), **learned}
        metrics |= {"lr": self.optimizer.param_groups[0]["lr"], "sample_s": sampled - start, "step_s": done - start}
        metrics |= {"tokens_per_s": rollouts.mask.sum() / (sampled - start), "peak_memory_gb": peak_memory_gb(policy.device)}
        return {name: float(x) for name, x in metrics.items()}

    def sample(self, texts):
        """Phase 2, from the newest weights. Returns what `Batch` keeps of them, as `roll_out` does."""
        drawn = roll_out(newest(self.policy, self.sampler), texts, self.config, self.step_number, self.sample_tokens)
        *kept, self.sample_tokens = drawn
        return kept

    def advantage(self, R, batch):
        """Eq. 18. `[N, K] -> [N, K]`. Other advantages may also use the batch: see experiments/algorithms.py."""
        return advantages(R, self.config.normalize)

    def surrogate(self, logprobs, part, A):
        """Eq. 8. `[n, K, T], part of the rollouts, [n, K] -> [n, K]`."""
        return clipped_objective(logprobs, part.logprobs, A, part.mask, self.config.clip_eps, self.config.length_normalize)

    def objective(self, part, A, g):
        """What the update maximises, one number per rollout `[n, K]`, and what is worth logging, by name.

        part: some groups of rollouts; A `[n, K]` their advantages; g `[n, K, D]` the reward's gradient at
        their captured embeddings, a constant, or `[n, K + 1, D]` with that of the prompt alone. Eq. 8, plus c times
        g . h(theta) and the text term, less the KL term.
        """
        config, mask, K = self.config, part.mask, A.shape[1]
        scores = score(self.policy, part, config.temperature, text=True)
        logprobs, text_logprobs = scores.logprobs, scores.text_logprobs[:, None]  # [n, K, T], [n, 1]
        value = self.surrogate(logprobs, part, A)
        if config.text_weight:
            value = value + config.text_weight * text_logprobs
        if config.pathwise:
            value = value + config.pathwise * pathwise(g[:, :K], scores.embeddings)
        if config.prompt_weight:
            value = value + config.prompt_weight * pathwise(g[:, K:], scores.prompt_embeddings[:, None])
        stats = {"approx_kl": kl_k3(part.logprobs, logprobs, mask), "prompt_loss": -text_logprobs.expand_as(value)}
        if config.kl:
            with torch.no_grad():
                at_start = score(self.reference, part, config.temperature).logprobs
            stats["kl_start"] = kl_k3(logprobs, at_start, mask)
            pull = kl_k2(logprobs, at_start, mask) if config.kl_estimator == "k2" else stats["kl_start"]
            value = value - config.kl * pull
        off = ((logprobs - part.logprobs).exp() - 1) * mask  # how far each ratio is from 1
        clipped = (off * A.sign()[..., None] > config.clip_eps).float()  # the other way nothing is clipped
        stats |= {"loss": -value, "clip_fraction": masked_mean(clipped, mask), "ratio_off": off.abs().amax(-1)}
        return value, {name: x.detach() for name, x in stats.items()}

    def update(self, rollouts, A, g):
        """Phase 5. One or more optimizer steps over one batch of N groups of rollouts. Returns means of what is worth logging.

        Every loss is a sum over rollouts divided by one number, the rollouts in the minibatch, so how a
        minibatch is split into micro-batches cannot change the gradient, not even when it has to be split
        again because the device ran out of memory.
        """
        config, (N, K) = self.config, A.shape
        stats, norms = [], []
        for epoch in range(config.epochs):
            shuffled = np.random.default_rng([config.seed, self.step_number, 3, epoch]).permutation(N)
            order = torch.from_numpy(shuffled).to(A.device)
            for minibatch in order.tensor_split(config.minibatches):
                least, where = int(self.cost(rollouts)[minibatch].max()), f"step {self.step_number + 1}: --tokens-per-batch"
                backward = lambda budget: self.backward(minibatch, rollouts, A, g, budget)  # noqa: B023
                parts, self.tokens_per_batch = on_every_rank(backward, self.tokens_per_batch, least, where, config.shard)
                stats.append([micro for part in parts for micro in part])
                norms.append(self.optimizer_step())
        first_ratio_off = max(float(micro["ratio_off"].max()) for micro in stats[0])
        every = [micro for part in stats for micro in part]
        means = {name: sum(float(micro[name].sum()) for micro in every) / (N * K * config.epochs) for name in every[0]}
        del means["ratio_off"]
        return {**means, "first_ratio_off": first_ratio_off, "grad_norm": float(np.mean(norms))}

    def backward(self, minibatch, rollouts, A, g, budget):
        """A rank's part of one minibatch's gradient, from zero. Returns what `objective` logs, a dict per micro-batch."""
        self.optimizer.zero_grad(set_to_none=True)
        stats, values = [], []
        for micro in filter(len, self.micro_batches(minibatch, rollouts, budget)):
            value, logged = self.objective(rollouts[micro], A[micro], g[micro])
            (-value.sum() / (len(minibatch) * A.shape[1])).backward()
            stats.append(logged)
            values.append(value.detach())
        finite("the loss", *values)  # here, where every rank comes, and not amid work that ranks share
        return stats

    def optimizer_step(self):
        """One step along the accumulated gradient, at this step's rate. Returns the gradient's norm before clipping."""
        ranks.sum_gradients(self.policy.model.parameters())
        norm = ranks.whole(torch.nn.utils.clip_grad_norm_(self.policy.model.parameters(), self.config.max_grad_norm))
        finite("the gradient", norm)
        if self.config.lr_decay:
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * (1 - self.step_number / self.config.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def cost(self, rollouts):
        """What each group costs in an update, in padded tokens: its prompt once, and K rationales. `-> [N]`."""
        return rollouts.prompt_mask.sum(1) - rollouts.n_shared + rollouts.ids.shape[1] * rollouts.mask.sum(-1).amax(1)

    def micro_batches(self, groups, rollouts, budget):
        """A rank's groups by length, in micro-batches whose padded tokens stay within the budget; at least one group each."""
        cost, order = self.cost(rollouts)[groups].sort(stable=True)
        # A row holds groups of similar cost, one per rank: so the ranks' micro-batches are alike, and equally many.
        rows = groups[order].split(ranks.size())
        most = [int(row[-1]) for row in cost.cpu().split(ranks.size())]  # read here, not while a GPU works on a micro-batch
        first = 0
        for last in range(1, len(rows) + 1):
            if last == len(rows) or (last + 1 - first) * most[last] > budget:
                yield torch.cat(rows[first:last])[ranks.mine()]
                first = last

    def save_batch(self, path, batch, figures):
        """Write the batch where a person can read it: texts, rationales, and each rationale's figures `{name: [N, K]}`."""
        texts = [(role, text) for role in self.config.roles for text in batch.texts[role]]
        rationales = [self.policy.tokenizer.batch_decode(group) for group in batch.rollouts.rationales()]
        save_batch(path, texts, rationales, batch.rollouts.finished, figures)


# ---------------------------------------------------------------- a whole run


def train(config, make_trainer=Trainer):
    """A whole run: evaluate, train, evaluate, save. Returns the summary that summary.json holds.

    make_trainer: another Trainer (experiments/). Raises GraceError for anything that the user can fix; SystemExit
    after SIGTERM or Ctrl-C, with a checkpoint written.
    """
    if summary := finished_summary(config):
        print(f"{config.out}: finished, after {summary['config']['steps']} steps\n\n{show_summary(summary)}")
        return summary
    run = Run(config)
    rows, heldout, graded = load_rows(config, run.skipped)
    config.check_groups(len(rows[0].get("negative", [])))
    run.check(rows)
    policy, reference = load_policies(config, run.checkpoint)
    trainer = make_trainer(policy, reference, rows, config)
    shown = [row.get("query") or row["text"] for row in (heldout or rows)[:6]]

    def evaluate(rationale=True):
        reader = newest(policy, trainer.sampler)
        if not heldout:  # fewer than ten rows of data
            return {"text_loss": text_loss(reader, shown)}
        return evaluate_heldout(reader, heldout, graded, rationale, config.temperature)

    def rationales():
        reader = newest(policy, trainer.sampler)
        record(config.out, trainer.step_number, reader, heldout)  # what the run's page shows of held-out rows
        return dict(zip(shown, encode_texts(reader, shown).rationales))

    print(
        f"{len(rows)} training rows ({len(rows[0].get('negative', []))} negatives each), {len(heldout)} held-out, "
        f"{sum(p.numel() for p in policy.model.parameters()) / 1e6:.2f} M parameters on {policy.device}"
    )
    run.begin(trainer, evaluate, rationales)
    with run:
        while trainer.step_number < config.steps:
            run.record(trainer.step())
    summary = run.finish()
    ranks.by_first(finish_page)(config.out)
    return summary


def main(arguments, make_trainer=Trainer):
    transformers.utils.logging.disable_progress_bar()
    commands = {"explain": explain, "report": report, "status": status}
    try:
        ranks.start()
        if arguments[:1] and arguments[0] in commands:
            commands[arguments[0]](arguments[1:])
        else:
            train(parse(arguments, __doc__), make_trainer)
    except GraceError as error:
        sys.exit(ranks.last_word(f"grace.py: {error}"))
    except torch.OutOfMemoryError as error:
        sys.exit(ranks.last_word(f"grace.py: out of memory outside the update and the sampler ({first_line(error)})"))
    except KeyboardInterrupt:  # before or after the training steps: nothing to save
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
