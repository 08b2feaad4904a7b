"""Table 4: other ways from a reward to an update, each a Trainer with one or two methods exchanged.

`advantage` says how much better than expected a rollout was, `surrogate` what is maximised for it. The reward,
the pathwise term and the KL term stay as they are. Off-policy steps (`--minibatches 4`, as in the released code)
are where the clips differ.

Shapes: N groups, K rollouts a group, T tokens.
"""

import dataclasses

import torch

from grace import Trainer, advantages, clipped_objective, judge
from rollout import sample_in_parts


class GRPO(Trainer):
    """Divided by the group's standard deviation. Shao et al. 2024, DeepSeekMath (arXiv 2402.03300), Eq. 3; here Eq. 7."""

    def advantage(self, R, rollouts, texts, embeddings, twins):
        return advantages(R, normalize=True)


class DrGRPO(Trainer):
    """Neither that division nor one by a rationale's own length: a sum over tokens, over the longest there can be.

    Liu et al. 2025, Understanding R1-Zero-Like Training (arXiv 2503.20783), Sec. 3.
    """

    def surrogate(self, logprobs, part, A):
        total = clipped_objective(logprobs, part.logprobs, A, part.mask, self.config.clip_eps, length_normalize=False)
        return total / self.policy.reading.max_new_tokens


class DAPO(Trainer):
    """Four changes to GRPO. Yu et al. 2025 (arXiv 2503.14476), Sec. 3.

    Clip-higher: a ratio may rise by 0.28 and fall by 0.2. Token-level mean: each token of the batch weighs the same,
    so a long rationale weighs more. Dynamic sampling: groups without spread are dropped (they sample anew; here the
    others count for more). Soft over-long penalty: over the last fifth of the limit, from 0 down to 1; it takes the
    place of gamma.
    """

    LOW, HIGH, CACHE = 0.2, 0.28, 0.2

    def advantage(self, R, rollouts, texts, embeddings, twins):
        lengths, limit = rollouts.mask.sum(-1), self.policy.reading.max_new_tokens  # [N, K]
        self.mean_length = lengths.float().mean()
        R = torch.where(rollouts.finished, R, R + self.config.gamma)  # undo gamma
        R = R - ((lengths - (1 - self.CACHE) * limit) / (self.CACHE * limit)).clamp(0, 1)
        kept = (R.std(1, keepdim=True) > 1e-5).float()  # [N, 1]; equal rationales differ by float noise
        return advantages(R, normalize=True) * kept / kept.mean().clamp(min=1e-8)

    def surrogate(self, logprobs, part, A):
        total = clipped_objective(logprobs, part.logprobs, A, part.mask, self.LOW, False, clip_high=self.HIGH)
        return total / self.mean_length


class ReinforcePlusPlus(Trainer):
    """Centred and scaled over the whole batch, not the group. Hu 2025, REINFORCE++ (arXiv 2501.03262)."""

    def advantage(self, R, rollouts, texts, embeddings, twins):
        return (R - R.mean()) / (R.std() + 1e-6)


class ReMax(Trainer):
    """Less the reward of the greedy rationale of the same text. Li et al. 2023 (arXiv 2310.10505).

    The greedy rationale is judged as one more rollout would be: against the sampled ones of all other texts.
    """

    def advantage(self, R, rollouts, texts, embeddings, twins):
        config, roles = self.config, self.config.roles
        trained = self.policy.prompts([text for role in roles for text in texts[role]])
        greedy = sample_in_parts(self.policy, trained, 1, 0.0, None, config.sample_tokens)
        sizes, baseline = [len(texts[role]) for role in roles], []
        for role, h, finished in zip(roles, greedy.embeddings.split(sizes), greedy.finished.split(sizes)):
            alone = dataclasses.replace(config, train_roles=role)
            reward, _, _ = judge({**embeddings, role: h}, finished, twins, alone)  # a group of one: no consistency
            near = torch.einsum("bkd,bjd->bk", h, embeddings[role]) / config.rollouts  # so: to the sampled ones
            baseline.append(reward + config.lambda_consistency * near / config.tau)
        return R - torch.cat(baseline)


ALGORITHMS = {
    "GRACE": Trainer,
    "GRPO": GRPO,
    "Dr. GRPO": DrGRPO,
    "DAPO": DAPO,
    "REINFORCE++": ReinforcePlusPlus,
    "ReMax": ReMax,
}
