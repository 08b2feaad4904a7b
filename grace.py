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

Words. A text's *role* is query, positive, negative or, without labels, text. Texts of trained roles get K rollouts and a
gradient; the others get one rollout that is held constant, an *anchor*. *Start* is the policy before training, the KL term's
reference.

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

The sum of both terms is (K-1)/K times the exact gradient where a rollout's reward depends on its own embedding alone and
c = (K-1)/K (all conditions: derivation 2 in docs/companion.md); elsewhere, as in the full recipe, c only weights the terms
against each other.

Departures from the paper's equations, each a setting, all undone by `--recipe paper`. (Five differences from the
released run remain: see the end of docs/companion.md.)

1. The reward is InfoNCE instead of Eq. 13 and 15, which cancel in the advantage (reward.py).
2. The pathwise term.
3. Queries are rolled out and trained like positives; in Eq. 12 they are fixed anchors.
4. Log-probabilities are summed over tokens, as in Eq. 19; Eq. 8 takes their mean. With a mean, the score-function term
   shrinks as rationales grow, and c would have to follow it.
5. Two terms keep the policy close to where it started. The text term is plain language-model training on the training
   texts, whose hidden states the update computes anyway (like the pre-training text mixed in by Ouyang et al. 2022). A
   light KL term on the rationales' tokens keeps words to their old meanings.
6. Rollouts are drawn, and scored, at temperature 0.7 instead of 1, closer to the greedy rationale that is used in the
   end. At 1, where the right word is often replaced by a wrong sample, the reward teaches to leave the word out.
7. The length penalty is relative (reward.py).

Shapes: B instances, K rollouts per group, M hard negatives, N groups (B per trained role), T tokens,
D hidden size.
"""

import os
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from config import parse
from evaluation.encoder import GraceEncoder, text_loss  # noqa: F401 (`from grace import GraceEncoder`)
from evaluation.explain import explain
from evaluation.page import finish_page, report
from evaluation.probe import probe
from evaluation.signs import batch_metrics, update_means, update_metrics
from evaluation.tasks import evaluate_heldout
from plumbing import ranks
from plumbing.data import load_rows
from plumbing.errors import GraceError, NotFinite, first_line, require_finite
from plumbing.run import Run, Signals, peak_memory_gb, save_batch, show_summary
from plumbing.status import status
from policy import load_policies
from reward import infonce_components, length_penalty, paper_components, scaled, total
from rollout import make_batch, roll_out, score

MAX_GRAD_NORM = 1.0

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
    """The mean over a rationale's own tokens, 0 where it has none. `[N, K, T] x 2 -> [N, K]`."""
    return (x * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def clipped_objective(logprobs, old_logprobs, advantage, mask, clip_eps, length_normalize=True, clip_high=None):
    """Eq. 8, to be maximised. `[N, K, T], [N, K, T], [N, K], [N, K, T] -> [N, K]`.

    With one optimizer step per batch the ratio is 1 up to rounding: in float32 nothing is clipped, and the gradient is
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


def judge(embeddings, finished, same_text, config):
    """Phase 3: rewards of the trained rollouts, their components, and the rewards' gradient.

    Returns R `[N, K]`, `{component: [N, K]}` before weighting, and g = d(sum R)/dh `[N, K, D]`: the direction
    in which the rewards would rise if the embeddings could move freely. Roles that are not trained are constants.
    """
    # Leaves of a graph of their own: [B, K, D] is all that this gradient ever touches.
    leaves = {role: x.detach().requires_grad_(role in config.roles) for role, x in embeddings.items()}
    if config.reward == "paper":
        by_role = [paper_components(leaves, same_text)]
    else:
        by_role = [infonce_components(leaves, role, config.infonce_temperature, same_text) for role in config.roles]
    components = {name: torch.cat([c[name] for c in by_role]) for name in by_role[0]}
    R = scaled(total(components, config.lambda_consistency, config.lambda_hard), config.tau)
    R = length_penalty(R, finished, config.gamma, relative=config.reward != "paper")
    # Of the sum, not of each rollout's own reward: an embedding also moves the rewards of the others it stands beside.
    g = torch.autograd.grad(R.sum(), [leaves[role] for role in config.roles])
    g = torch.cat([x.flatten(0, -3) for x in g])
    return R.detach(), {name: x.detach() for name, x in components.items()}, g


class Trainer:
    """The policy, its optimizer and its data: what a training step needs and what a resumed run restores."""

    def __init__(self, policy, reference, rows, config):
        self.policy, self.reference, self.rows, self.config = policy, reference, rows, config
        self.optimizer = torch.optim.AdamW(policy.model.parameters(), config.lr, fused=True)
        self.step_number, self.batch = 0, None  # steps made; what the last one knew, for whoever looks into it

    def step(self):
        """One step of Algorithm 1. Returns its metrics. A function of weights, seed and step number."""
        config, start = self.config, time.perf_counter()
        # 1. A batch of instances: triplets, or texts alone.
        batch = self.batch = make_batch(self.next_rows(), config.reward == "paper", self.policy.device)
        # 2. Rationales from the current policy, and the embeddings that come with them (Eq. 9 to 12, 20).
        rollouts, batch.embeddings, batch.prompt_embeddings = roll_out(self.policy, batch.texts, config, self.step_number)
        batch.rollouts = rollouts
        sampled = time.perf_counter()
        # 3. What each rationale is worth (Eq. 13 to 17, 21, 28), and the reward's gradient at its embedding.
        R, components, g = judge(batch.embeddings, rollouts.finished, batch.same_text, config)
        g_prompt = None
        if config.prompt_weight:  # the same for the prompts alone: one more embedding per text, [N, D]
            ended = torch.ones_like(rollouts.finished[:, :1])  # there is no rationale that could be too long
            g_prompt = judge(batch.prompt_embeddings, ended, batch.same_text, config)[2][:, 0]
        batch.figures = {"tokens": rollouts.mask.sum(-1), "reward": R, **components}
        require_finite("a reward, its gradient or an embedding's direction", R, g, 1 / rollouts.embeddings.norm(dim=-1))
        metrics = batch_metrics(rollouts, R, components)
        # 4. Better or worse than the other rationales of the same text (Eq. 18).
        A = self.advantage(R, batch)
        # 5. The clipped update (Eq. 8, 19), with the pathwise term.
        metrics |= self.update(rollouts, A, g, g_prompt)
        self.step_number += 1
        metrics |= {"lr": self.optimizer.param_groups[0]["lr"], "tokens_per_s": float(rollouts.mask.sum()) / (sampled - start)}
        metrics |= {"sample_s": sampled - start, "step_s": time.perf_counter() - start}
        return {"step": self.step_number, **metrics, "peak_memory_gb": peak_memory_gb(self.policy.device)}

    def next_rows(self):
        """The next B rows of a stream of shuffled passes over the data, a function of seed and step."""
        n, B = len(self.rows), self.config.batch
        at = np.arange(self.step_number * B, (self.step_number + 1) * B)
        order = {k: np.random.default_rng([self.config.seed, k]).permutation(n) for k in set(at // n)}
        return [self.rows[order[i // n][i % n]] for i in at]

    def advantage(self, R, batch):
        """Eq. 18. `[N, K] -> [N, K]`. Other advantages may also use the batch: see experiments/algorithms.py."""
        return advantages(R)

    def surrogate(self, logprobs, part, A):
        """Eq. 8. `[n, K, T], part of the rollouts, [n, K] -> [n, K]`."""
        return clipped_objective(logprobs, part.logprobs, A, part.mask, self.config.clip_eps, self.config.length_normalize)

    def objective(self, now, start, part, A, g, g_prompt=None):
        """What the update maximises, one number per rollout `[n, K]`.

        now, start: the `Scores` of the rollouts `part` by the policy, with gradients, and by the policy it started from;
        A `[n, K]` their advantages; g `[n, K, D]` the reward's gradient at their captured embeddings, a constant.
        """
        config = self.config
        value = self.surrogate(now.logprobs, part, A)  # Eq. 8: the policy as the author of its rationales
        value = value + config.pathwise * pathwise(g, now.embeddings)  # the second half: the policy as their reader
        if g_prompt is not None:
            value = value + config.prompt_weight * pathwise(g_prompt, now.prompt_embeddings)[:, None]
        if config.text_weight:  # still a language model
            value = value + config.text_weight * now.text_logprobs[:, None]
        if config.kl:  # still near its start
            kl = kl_k2 if config.kl_estimator == "k2" else kl_k3
            value = value - config.kl * kl(now.logprobs, start.logprobs, part.mask)
        return value

    def update(self, rollouts, A, g, g_prompt=None):
        """Phase 5: an optimizer step per minibatch of the N groups. Returns means of what is worth logging.

        Every loss is a sum over rollouts divided by one number, the rollouts in the minibatch. So neither how a minibatch
        is split to fit the memory nor how it is shared out to ranks changes the gradient.
        """
        config, (N, K), log, norms = self.config, A.shape, [], []
        shuffled = torch.from_numpy(np.random.default_rng([config.seed, self.step_number, 3, 0]).permutation(N)).to(A.device)
        for minibatch in shuffled.tensor_split(config.minibatches):
            for micro in micro_batches(rollouts, minibatch, config.tokens_per_batch):
                part, start = rollouts[micro], None
                now = score(self.policy, part, config.temperature)
                if config.kl:
                    with torch.no_grad():
                        start = score(self.reference, part, config.temperature, text=False)
                value = self.objective(now, start, part, A[micro], g[micro], None if g_prompt is None else g_prompt[micro])
                (-value.sum() / (len(minibatch) * K)).backward()
                log.append((len(norms), update_metrics(now, start, part, A[micro], value, config.clip_eps)))
            norms.append(self.optimizer_step())
        return {**update_means(log, N * K), "grad_norm": float(np.mean(norms))}

    def optimizer_step(self):
        """One step along the accumulated gradient, at this step's rate. Returns the gradient's norm before clipping."""
        ranks.sum_gradients(self.policy.model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.policy.model.parameters(), MAX_GRAD_NORM)
        require_finite("the gradient", norm)
        if self.config.lr_decay:
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * (1 - self.step_number / self.config.steps)
        self.optimizer.step()
        self.policy.follow()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)


def micro_batches(rollouts, groups, budget):
    """This rank's share of the groups, by length, in micro-batches that hold `budget` padded tokens at most (or one group)."""
    prompts, rationales = rollouts.prompt_mask.sum(1) - rollouts.n_shared, rollouts.mask.sum(-1).amax(1).clamp(min=1)
    tokens = torch.stack([prompts, rollouts.ids.shape[1] * rationales]).cpu()  # [2, N]
    order = tokens.sum(0)[groups.cpu()].argsort(stable=True)
    part = []
    for i in groups[order][ranks.rank :: ranks.size].tolist():  # each rank gets short ones and long ones
        padded = (len(part) + 1) * tokens[:, [*part, i]].amax(1).sum()
        if part and padded > budget:
            yield torch.tensor(part, device=groups.device)
            part = []
        part.append(i)
    if part:
        yield torch.tensor(part, device=groups.device)


# ---------------------------------------------------------------- a whole run


def train(config, make_trainer=Trainer):
    """A whole run: evaluate, train, evaluate, save. Returns the summary that summary.json holds.

    make_trainer: another Trainer (experiments/). Raises GraceError for anything that the user can fix; SystemExit
    after SIGTERM or Ctrl-C, with a checkpoint written.
    """
    run = Run(config)
    if run.summary:
        print(f"{config.out}: finished, after {run.summary['config']['steps']} steps\n\n{show_summary(run.summary)}")
        return run.summary
    rows, heldout, graded = load_rows(config)
    config.check_groups(len(rows[0].get("negative", [])))
    policy, reference = load_policies(config, run.checkpoint)
    config.check_roles(policy.reading)
    trainer = make_trainer(policy, reference, rows, config)
    print(
        f"{len(rows)} training rows ({len(rows[0].get('negative', []))} negatives each), {len(heldout)} held-out, "
        f"{sum(p.numel() for p in policy.model.parameters()) / 1e6:.2f} M parameters on {policy.device}, {policy.dtype}"
    )

    def evaluate(rationale=True):
        """Scores on held-out rows, `{name: score}`."""
        if not heldout:  # fewer than ten rows of data
            return {"text_loss": text_loss(policy, [row.get("query") or row["text"] for row in rows[:6]])}
        return evaluate_heldout(policy, heldout, graded, rationale, config.temperature)

    def note(scores):
        """Put the scores, and what the policy writes and finds now, into --out. Returns the scores."""
        return run.note(trainer.step_number, scores, *probe(policy, heldout or rows))

    if not run.restore(trainer):
        run.begin(trainer, before := evaluate())  # evaluated first: what cannot work fails before anything is deleted
        note(before)
    due = lambda every: every and trainer.step_number % every == 0
    bar = tqdm(total=config.steps, initial=trainer.step_number, unit="step", dynamic_ncols=True, disable=not ranks.first())
    with Signals() as signals, bar:
        while trainer.step_number < config.steps:
            metrics = safe_step(trainer)
            last = trainer.step_number == config.steps
            bar.set_postfix({name: f"{metrics[name]:.2f}" for name in ("reward", "length", "distinct", "step_s")})
            bar.update()
            if due(config.eval_every) and not last:
                metrics |= {f"heldout_{name}": score for name, score in note(evaluate()).items()}
            run.log(metrics)
            stop = max(ranks.gather(signals.received))  # a signal to one rank is enough
            if stop or last or due(config.save_every):
                run.save(trainer)
            if stop:
                bar.close()
                print(f"stopped after step {trainer.step_number}, with a checkpoint: the same command with --resume continues")
                sys.exit(128 + stop)
    run.save_model(policy)  # first: the evaluation can take long, and be stopped
    summary = run.finish(trainer, note(evaluate()), evaluate(rationale=False))
    finish_page(config.out)
    return summary


def safe_step(trainer):
    """One step. Where the device runs out of memory the same step is made again, with half the token budget.

    That changes nothing but the time it takes: a step is a function of weights, seed and step number, and an update of one
    minibatch moves the weights as its last act. Raises GraceError where one group alone is too much, where the weights have
    moved already (`--minibatches`), and, with a file that shows the batch, for a number that is not finite.
    """
    config = trainer.config
    while True:
        try:
            return trainer.step()
        except torch.OutOfMemoryError:
            pass  # handled below: inside this block the exception still keeps the tensors alive
        except NotFinite as error:
            path = os.path.join(config.out or ".", f"not_finite_step_{trainer.step_number + 1}.json")
            save_batch(path, trainer)
            advice = f"lower --lr, or inspect the data; {path} shows the batch"
            raise GraceError(f"step {trainer.step_number + 1}: {error}: {advice}") from error
        trainer.optimizer.zero_grad(set_to_none=True)
        if trainer.step_number == 0:
            trainer.optimizer.state.clear()  # it is made in the first step: half of it could be there
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        where = f"step {trainer.step_number + 1}: out of memory with --tokens-per-batch {config.tokens_per_batch}"
        if config.minibatches > 1 or ranks.size > 1:
            raise GraceError(f"{where}; lower it, and --resume continues from the newest checkpoint")
        if config.tokens_per_batch <= config.rollouts:
            raise GraceError(f"{where}, one group at a time; lower --rollouts, --max-new-tokens or --max-prompt-tokens")
        config.tokens_per_batch //= 2
        tqdm.write(f"{where}; continuing with {config.tokens_per_batch}")


def main(arguments, make_trainer=Trainer):
    commands = {"explain": explain, "report": report, "status": status}
    try:
        if arguments[:1] and arguments[0] in commands:
            return commands[arguments[0]](arguments[1:])
        ranks.start()
        train(parse(arguments, __doc__), make_trainer)
    except GraceError as error:
        sys.exit(f"grace.py: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"grace.py: out of memory outside the training steps ({first_line(error)})")
    except KeyboardInterrupt:  # before or after the training steps: nothing to save
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
