"""GRACE: a language model taught by reward to write rationales that make good embeddings.

For each text x the policy writes a rationale r ~ pi(. | P(x)); the mean of its hidden states over
text and rationale is the embedding h. How well the embeddings of a batch tell right pairs from
wrong ones is not a loss but the *reward* of the rationales, and a clipped GRPO update teaches the
policy. One training step is Algorithm 1, in five numbered phases: see `Trainer.step`.

    python grace.py --model DIR_OR_HUB_ID --data FILE_OR_HUB_ID --out DIR      train
    python grace.py status DIR                                                 how a run is doing
    python grace.py explain --model DIR_OR_HUB_ID "text a" "text b"            read two rationales

Both halves of the gradient. The objective is the expected reward of what the policy writes,

    J(theta) = E[R_theta(y)],  y ~ pi_theta,

and theta stands in it twice: y is drawn from the policy, and R is computed from the policy's own
hidden states. So, for any one text, writing the expectation as a sum over rationales,

    grad J = sum_y grad(pi_theta(y)) R_theta(y)   +  sum_y pi_theta(y) grad(R_theta(y))
           = E[R_theta(y) grad log pi_theta(y)]   +  E[grad R_theta(y)]
             the score-function term: GRPO           the pathwise term

(Schulman et al. 2015, stochastic computation graphs). Eq. 19 keeps the first alone. The second is
nearly free: take g = dR/dh at the embeddings the sampler captured, a graph over [B, K, D] that
never touches the network, and add -c * sum(g . h(theta)) to the loss. The update's forward pass
computes h(theta) anyway, and since g is fixed the term splits over micro-batches exactly (as in
GradCache, Gao et al. 2021). `--pathwise c` weighs it; 0 is the paper.

When is the sum exact? Where a rollout's reward depends on its own embedding alone (fixed anchors, as
in Eq. 12, and no consistency term), with log-probabilities summed over tokens (`--no-length-normalize`)
and c = (K-1)/K, because a mean that includes the rollout itself shrinks the first term by that factor.
Where rollouts stand in each other's rewards, as queries and positives do here, an advantage credits a
rollout with its own reward only, while g has all of them: there, c weighs the two terms.

Where this departs from the paper, each a setting, all undone by `--recipe paper`:

1. The reward is InfoNCE instead of Eq. 13 and 15, which cancel in the advantage (reward.py).
2. The pathwise term.
3. Queries are rolled out and trained like positives; in Eq. 12 they are fixed anchors.
4. Log-probabilities are summed over tokens, as in Eq. 19, not averaged as in Eq. 8: so c weighs the terms alike at any
   length, and c < 1 leaves the rationale more of the work.
5. Two light terms keep the policy what it was. The language-model loss on the texts' own tokens, whose hidden states the
   update has anyway, keeps it a language model (as mixing in pre-training text does, Ouyang et al. 2022); a KL term (k3)
   on the rationales' tokens keeps their words what a reader takes them for.
6. Rollouts are drawn, and scored, at temperature 0.7 instead of 1, nearer to the greedy rationale that is used in the end.
   A name that is right when greedy but often wrong when drawn is punished for the draws, and the policy stops naming.
7. The length penalty is relative (reward.py).

Shapes: B instances, K rollouts a group, M hard negatives, N groups (B a trained role), T tokens,
D hidden size.
"""

import sys
import time

import datasets
import numpy as np
import torch
import transformers

import reward as rewards
import similarity
from config import parse
from data import GraceError, first_line
from guard import finite, inspected, within_memory
from look import explain, status
from recompute import recompute_layers
from report import describe, peak_memory_gb
from rollout import sample_in_parts, score
from training import run

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


def clipped_objective(logprobs, old_logprobs, advantage, mask, clip_eps, length_normalize=True, clip_high=None):
    """Eq. 8, to be maximised. `[N, K, T], [N, K, T], [N, K], [N, K, T] -> [N, K]`.

    With one update a batch the ratio is 1 everywhere, nothing is clipped, and the gradient is
    Eq. 19's. From the second update on, `min` takes a token out of the gradient once its ratio has
    moved past 1 +- eps in the direction the advantage wants; a move the other way is never clipped.
    clip_high: another eps upwards. length_normalize=False: the sum over tokens, not their mean.
    """
    ratio = (logprobs - old_logprobs).exp()
    A = advantage[..., None]
    token = torch.minimum(ratio * A, ratio.clamp(1 - clip_eps, 1 + (clip_high or clip_eps)) * A) * mask
    return token.sum(-1) / (mask.sum(-1) if length_normalize else 1)


def kl_k3(logprobs, reference, mask):
    """KL(policy || reference), Schulman's k3 estimator, mean over tokens. `[N, K, T] x 3 -> [N, K]`."""
    log_ratio = reference - logprobs
    return ((log_ratio.exp() - 1 - log_ratio) * mask).sum(-1) / mask.sum(-1)


def pathwise(g, h):
    """The second half of the gradient, to be maximised. `[N, K, D] x 2 -> [N, K]`.

    g is the reward's gradient at the embeddings that the sampler captured, a constant; h are the same embeddings from
    the update's forward pass, where they depend on theta. Not the reward: a number with the reward's gradient.
    """
    return (g * h).sum(-1)


# ---------------------------------------------------------------- Algorithm 1


def batch_roles(rows, anchored=False):
    """A batch of rows as texts by role, and which instances share a text. `-> {role: list}, [B, B] bool`.

    anchored: an unsupervised text also plays the anchor (Eq. 20).
    """
    if "text" in rows[0]:
        texts = {"text": [r["text"] for r in rows]}
        if anchored:
            texts["anchor"] = texts["text"]
    else:
        texts = {name: [r[name] for r in rows] for name in ("query", "positive")}
        texts["negative"] = [text for r in rows for text in r["negative"]]
    own = [{r[name] for name in r if name != "negative"} for r in rows]  # the texts that stand for an instance
    twins = torch.tensor([[bool(a & b) for b in own] for a in own])
    return texts, twins


def roll_out(policy, texts, config, generator):
    """Phase 2. Trained roles in one call: K rollouts a text; the others: one, as anchors (Eq. 12, 20).

    Returns the trained roles' rollouts, N groups in the order of `config.roles`, and the embeddings
    of every role, `[B, K or 1, D]`, negatives `[B, M, K or 1, D]`.
    """
    trained = [text for role in config.roles for text in texts[role]]
    budget = config.sample_tokens
    rollouts = sample_in_parts(policy, policy.prompts(trained), config.rollouts, config.temperature, generator, budget)
    embeddings = dict(zip(config.roles, rollouts.embeddings.split([len(texts[role]) for role in config.roles])))
    fixed = [role for role in texts if role not in embeddings]
    embeddings |= {role: rollouts.embeddings[:0, :1] for role in fixed}  # where a role has no texts, M = 0
    if anchors := [text for role in fixed for text in texts[role]]:
        drawn = sample_in_parts(policy, policy.prompts(anchors), 1, config.anchor_temperature, generator, budget)
        embeddings |= dict(zip(fixed, drawn.embeddings.split([len(texts[role]) for role in fixed])))
        rollouts.cut += drawn.cut
    if "negative" in texts:
        B, (_, K, D) = len(texts["query"]), embeddings["negative"].shape
        embeddings["negative"] = embeddings["negative"].view(B, len(texts["negative"]) // B, K, D)
    return rollouts, embeddings


def judge(embeddings, finished, twins, config):
    """Phase 3. Rewards of the trained rollouts, their components, and the rewards' gradient.

    Returns R `[N, K]`, `{component: [N, K]}` before weighing, and g = d(sum R)/dh `[N, K, D]`: where
    the reward would go up if the embeddings could move freely. Roles that are not trained are constants.
    """
    leaves = {role: x.detach().requires_grad_(role in config.roles) for role, x in embeddings.items()}
    if config.reward == "paper":
        by_role = [rewards.paper_components(leaves, twins)]
    else:
        by_role = [rewards.infonce_components(leaves, role, config.infonce_temperature, twins) for role in config.roles]
    components = {name: torch.cat([c[name] for c in by_role]) for name in by_role[0]}
    R = rewards.scaled(rewards.total(components, config.lambda_consistency, config.lambda_hard), config.tau)
    R = rewards.length_penalty(R, finished, config.gamma, config.relative_length_penalty)
    g = torch.autograd.grad(R.sum(), [leaves[role] for role in config.roles])
    g = torch.cat([x.flatten(0, -3) for x in g])
    return R.detach(), {name: x.detach() for name, x in components.items()}, g


class Trainer:
    """The policy, its optimizer and its data: what a training step needs and what a resumed run restores."""

    def __init__(self, policy, reference, rows, config):
        self.policy, self.reference, self.rows, self.config = policy, reference, rows, config
        self.sampler = policy.twin() if config.dtype == "bfloat16" else policy
        self.optimizer = torch.optim.AdamW(policy.model.parameters(), config.lr, weight_decay=config.weight_decay, fused=True)
        self.generator = torch.Generator(policy.device).manual_seed(config.seed)
        self.step_number = 0
        similarity.kernel = config.kernel
        if config.recompute:
            recompute_layers(policy)

    def batch(self):
        """Phase 1. The next B rows of a stream of shuffled passes over the data, a function of seed and step."""
        n, B = len(self.rows), self.config.batch
        at = np.arange(self.step_number * B, (self.step_number + 1) * B)
        order = {k: np.random.default_rng([self.config.seed, k]).permutation(n) for k in set(at // n)}
        return [self.rows[order[i // n][i % n]] for i in at]

    def step(self):
        """One step of Algorithm 1. Returns its metrics."""
        policy, config, start = self.policy, self.config, time.perf_counter()
        # 1. A batch of instances.
        texts, twins = batch_roles(self.batch(), anchored=config.reward == "paper")
        twins = twins.to(policy.device)
        # 2. Rationales from the current policy, and the embeddings that come with them (Eq. 9 to 12).
        least, drawn = config.rollouts * policy.reading.max_new_tokens, self.generator.get_state()
        rollouts, embeddings = within_memory(self, "sample_tokens", least, self.sample, texts, drawn)
        sampled = time.perf_counter()
        # 3. What each rationale is worth (Eq. 13 to 17), and the reward's gradient at its embedding.
        R, components, g = judge(embeddings, rollouts.finished, twins, config)
        # 4. Better or worse than the other rationales of the same text (Eq. 18).
        A = self.advantage(R, rollouts, texts, embeddings, twins)
        # 5. The clipped update (Eq. 8, 19), with the pathwise term.
        self.set_rate()
        with inspected(self, texts, rollouts, reward=R, advantage=A, **components):
            finite("a reward or its gradient", R, g)
            learned = self.update(rollouts, A, g)
        self.step_number += 1
        done = time.perf_counter()
        metrics = {"step": self.step_number, **describe(rollouts, R, components), **learned}
        metrics |= {"lr": self.optimizer.param_groups[0]["lr"], "sample_s": sampled - start, "step_s": done - start}
        metrics |= {"tokens_per_s": rollouts.mask.sum() / (sampled - start), "peak_memory_gb": peak_memory_gb(policy.device)}
        return {name: float(x) for name, x in metrics.items()}

    def set_rate(self):
        """This step's learning rate."""
        if self.config.lr_decay:
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * (1 - self.step_number / self.config.steps)

    def sample(self, texts, drawn):
        """Phase 2, from a given state of the generator on."""
        self.generator.set_state(drawn)
        if self.sampler is not self.policy:
            self.sampler.follow(self.policy)
        return roll_out(self.sampler, texts, self.config, self.generator)

    def advantage(self, R, rollouts, texts, embeddings, twins):
        """`[N, K] -> [N, K]`: Eq. 18. What else it could be, and from what: experiments/algorithms.py."""
        return advantages(R, self.config.normalize)

    def surrogate(self, logprobs, part, A):
        """Eq. 8. `[n, K, T], part of the rollouts, [n, K] -> [n, K]`."""
        return clipped_objective(logprobs, part.logprobs, A, part.mask, self.config.clip_eps, self.config.length_normalize)

    def objective(self, part, A, g):
        """What the update maximises, a number a rollout `[n, K]`, and what is worth logging, by name.

        part: some groups of rollouts; A `[n, K]` their advantages; g `[n, K, D]` the reward's gradient at
        their captured embeddings, a constant. Eq. 8, plus c times g . h(theta) and the text term, less the KL term.
        """
        config, mask = self.config, part.mask
        logprobs, h, text = score(self.policy, part, config.temperature, text=True)
        value = self.surrogate(logprobs, part, A)
        if config.text_weight:
            value = value + config.text_weight * text[:, None]
        if config.pathwise:
            value = value + config.pathwise * pathwise(g, h)
        seen = {"approx_kl": kl_k3(part.logprobs, logprobs, mask), "text_loss": -text[:, None].expand_as(value)}
        if config.kl:
            with torch.no_grad():
                at_start, _ = score(self.reference, part, config.temperature)
            seen["kl_start"] = kl_k3(logprobs, at_start, mask)
            value = value - config.kl * seen["kl_start"]
        off = ((logprobs - part.logprobs).exp() - 1).abs() * mask
        seen |= {"loss": -value, "clip_fraction": (off > config.clip_eps).sum(-1) / mask.sum(-1), "ratio_off": off.amax(-1)}
        return value, {name: x.detach() for name, x in seen.items()}

    def update(self, rollouts, A, g):
        """Phase 5. One or more optimizer steps over one batch of N groups of rollouts.

        Every loss is a sum over rollouts divided by one number, the rollouts in the minibatch, so how a
        minibatch is split into micro-batches cannot change the gradient: not even when it has to be split
        again, because the memory was too small.
        """
        config, (N, K) = self.config, A.shape
        sums, norms, first_ratio_off = {}, [], 0.0
        for _ in range(config.epochs):
            order = torch.randperm(N, generator=self.generator, device=A.device)
            for minibatch in order.tensor_split(config.minibatches):
                least, work = int(self.tokens(rollouts)[minibatch].max()), (minibatch, rollouts, A, g)
                seen, ratio_off = within_memory(self, "tokens_per_batch", least, self.backward, *work)
                first_ratio_off = first_ratio_off if norms else ratio_off
                for name, total in seen.items():
                    sums[name] = sums.get(name, 0.0) + total
                norms.append(self.descend())
        means = {name: total / (N * K * config.epochs) for name, total in sums.items()}
        return {**means, "first_ratio_off": first_ratio_off, "grad_norm": float(np.mean(norms))}

    def descend(self):
        """One optimizer step along the gradient that has gathered. Returns its norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.policy.model.parameters(), self.config.max_grad_norm)
        finite("the gradient", norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def backward(self, minibatch, rollouts, A, g):
        """The gradient of one minibatch, from nothing. Returns sums of what is worth logging, and the largest `ratio_off`."""
        self.optimizer.zero_grad(set_to_none=True)
        sums, ratio_off = {}, 0.0
        for micro in self.micro_batches(minibatch, rollouts):
            value, seen = self.objective(rollouts[micro], A[micro], g[micro])
            finite("the loss", value)
            (-value.sum() / (len(minibatch) * A.shape[1])).backward()
            ratio_off = max(ratio_off, float(seen.pop("ratio_off").max()))
            for name, x in seen.items():
                sums[name] = sums.get(name, 0.0) + float(x.sum())
        return sums, ratio_off

    def tokens(self, rollouts):
        """What each group costs in an update, in padded tokens: its prompt once, and K rationales. `-> [N]`."""
        return rollouts.prompt_mask.sum(1) - rollouts.shared + rollouts.ids.shape[1] * rollouts.mask.sum(-1).amax(1)

    def micro_batches(self, groups, rollouts):
        """Groups by length, in micro-batches whose padded tokens stay within the budget; at least one a batch."""
        cost = self.tokens(rollouts)
        groups = groups[cost[groups].argsort()]
        first = 0
        for last in range(1, len(groups) + 1):
            if last == len(groups) or (last + 1 - first) * int(cost[groups[last]]) > self.config.tokens_per_batch:
                yield groups[first:last]
                first = last


# ---------------------------------------------------------------- the command line


def train(config, make_trainer=Trainer):
    """A whole run (training.py): evaluate, train, evaluate, save. Returns the summary that summary.json holds."""
    return run(config, make_trainer)


def main(arguments):
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    commands = {"explain": explain, "status": status}
    try:
        if arguments[:1] and arguments[0] in commands:
            commands[arguments[0]](arguments[1:])
        else:
            train(parse(arguments, __doc__))
    except GraceError as error:
        sys.exit(f"grace.py: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"grace.py: out of memory beside the update and the sampler ({first_line(error)})")
    except KeyboardInterrupt:  # before or after the training steps: nothing to save
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
