"""Table 4: other ways from a reward to an update, each a Trainer with one or two methods replaced.

`advantage` says how much better than expected a rollout was, `surrogate` what is maximised for it. The reward, the
pathwise term and the KL term stay as they are. The clips differ only in off-policy steps, from the second optimizer
step on a batch (`--minibatches 4`, as in the released code). The full recipe's own rule, mean-centred sums over tokens, is that
of Dr. GRPO (Liu et al. 2025, arXiv 2503.20783) but for its constant 1/T.

    python experiments/peer.py DAPO --model DIR --data FILE --out DIR [flags of grace.py]

Shapes: N groups, K rollouts per group, T tokens.
"""

import dataclasses

import torch

from grace import Trainer, advantages, clipped_objective, judge
from plumbing.errors import GraceError
from rollout import sample_texts, texts_of


class GRPO(Trainer):
    """Divided by the group's standard deviation. Shao et al. 2024, DeepSeekMath (arXiv 2402.03300), Eq. 3; here Eq. 7."""

    def advantage(self, R, batch):
        return advantages(R, normalize=True)


class DAPO(Trainer):
    """Four changes to GRPO. Yu et al. 2025 (arXiv 2503.14476), Sec. 3.

    Clip-higher: a ratio may rise by 0.28 and fall by 0.2. Token-level mean: each token of the batch weighs the same,
    so a long rationale weighs more. Dynamic sampling: groups without spread are dropped (the paper samples others in
    their place; here the remaining groups weigh more). Soft over-long penalty: it rises from 0 to 1 over the last fifth
    of the allowed length, and takes the place of gamma.
    """

    LOW, HIGH, CACHE = 0.2, 0.28, 0.2

    def __init__(self, policy, reference, rows, config):
        if config.reward == "paper":  # Eq. 28 puts -gamma in the reward's place, so it cannot be undone
            raise GraceError("DAPO has a length penalty of its own in the place of gamma: not with --reward paper")
        super().__init__(policy, reference, rows, config)

    def advantage(self, R, batch):
        rollouts, limit = batch.rollouts, self.policy.reading.max_new_tokens
        lengths = rollouts.mask.sum(-1)  # [N, K]
        self.mean_length = lengths.float().mean()
        R = torch.where(rollouts.finished, R, R + self.config.gamma)  # undo gamma
        R = R - ((lengths - (1 - self.CACHE) * limit) / (self.CACHE * limit)).clamp(0, 1)
        kept = (R.std(1, keepdim=True) > 1e-5).float()  # [N, 1]; equal rationales differ by rounding
        return advantages(R, normalize=True) * kept / kept.mean().clamp(min=1e-8)

    def surrogate(self, logprobs, part, A):
        total = clipped_objective(logprobs, part.logprobs, A, part.mask, self.LOW, False, clip_high=self.HIGH)
        return total / self.mean_length


class ReinforcePlusPlus(Trainer):
    """Centred and scaled over the whole batch, not the group. Hu 2025, REINFORCE++ (arXiv 2501.03262)."""

    def advantage(self, R, batch):
        return (R - R.mean()) / (R.std() + 1e-6)


class ReMax(Trainer):
    """Less the reward of the greedy rationale of the same text. Li et al. 2023 (arXiv 2310.10505).

    The greedy rationale is judged as one more rollout would be: against the sampled ones of all other texts.
    """

    def __init__(self, policy, reference, rows, config):
        if not {*config.roles} <= {"query", "positive"} or policy.reading.documents == "prompt":
            raise GraceError("ReMax judges one greedy rationale of each query and positive: train only these, with rationales")
        super().__init__(policy, reference, rows, config)

    def advantage(self, R, batch):
        config, texts, roles = self.config, batch.texts, self.config.roles
        greedy = sample_texts(self.policy, texts_of(texts, roles), 1, 0.0, 0, config.tokens_per_batch)
        sizes, baseline = [len(texts[role]) for role in roles], []
        for role, h, finished in zip(roles, greedy.embeddings.split(sizes), greedy.finished.split(sizes)):
            alone = dataclasses.replace(config, train_roles=role)
            reward, _, _ = judge({**batch.embeddings, role: h}, finished, batch.same_text, alone)
            # A group of one has no consistency. So its consistency is that with the sampled rollouts of its text.
            near = torch.einsum("bkd,bjd->bk", h, batch.embeddings[role]) / config.rollouts
            baseline.append(reward + config.lambda_consistency * near / config.tau)
        return R - torch.cat(baseline)


ALGORITHMS = {
    "GRACE": Trainer,
    "GRPO": GRPO,
    "DAPO": DAPO,
    "REINFORCE++": ReinforcePlusPlus,
    "ReMax": ReMax,
}
