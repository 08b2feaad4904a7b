"""What GRACE is compared with: contrastive fine-tuning and SimCSE, with the same policy, pooling, data and evaluation.

Base is P(x) pooled, and Base with reasoning adds the untrained policy's rationale; neither is trained, so neither is in
this file. `Contrastive` and `SimCSE` are Trainers with a step of their own: they write no rationale while they learn, and
what is a reward in GRACE is their loss. `ForcedContrastive` has that loss over rationales that it is given, and
`PathwiseAlone` removes GRPO from GRACE.

Shapes: B instances, M hard negatives per instance, n texts, D hidden size.
"""

import dataclasses
import time

import torch

from grace import Trainer
from plumbing import ranks
from plumbing.errors import GraceError
from policy import Policy
from pool import fold, unit
from reward import infonce
from rollout import make_batch, sample, score, text_logprobs, uniforms


class LossTrainer(Trainer):
    """One AdamW step on a loss of the prompts' embeddings. Subclasses have `loss(batch)`. For one process."""

    def __init__(self, policy, reference, rows, config):
        if ranks.size > 1:
            raise GraceError("a loss reads its whole batch at once, in one process: leave out torchrun")
        super().__init__(policy, reference, rows, config)

    def step(self):
        """One step. Returns its metrics."""
        start = time.perf_counter()
        batch = make_batch(self.next_rows(), device=self.policy.device)
        loss = self.loss(batch)
        loss.backward()
        norm = self.optimizer_step()
        self.step_number += 1
        metrics = {"step": self.step_number, "loss": loss.detach(), "reward": -loss.detach(), "length": 0, "distinct": 0}
        return {name: float(x) for name, x in (metrics | {"grad_norm": norm, "step_s": time.perf_counter() - start}).items()}

    def embed(self, texts, share=True):
        """P(x) pooled, and the mean log-probability of its text, with gradients. `-> [n, D], [n]`."""
        policy, x = self.policy, self.policy.template(texts, share)
        hidden, to_pool, _ = policy.prefill(x.ids, x.mask, x.n_shared)
        ids, counted, text = (part[:, x.n_shared :] for part in (x.ids, x.counted, x.text))
        of_text = text_logprobs(policy, hidden, ids, counted, text)
        return unit(fold(None, to_pool, counted, policy.reading.pooling)), of_text


class Contrastive(LossTrainer):
    """InfoNCE as the loss (Oord et al. 2018): query to the batch's positives and own hard negatives, positive to queries.

    The very function that GRACE is rewarded with, over one embedding per text, at the temperature that suits a loss.
    """

    def loss(self, batch):
        """The mean negative log-softmax of both directions, in nats, and the weighted text term."""
        t, texts, B = self.config.infonce_temperature, batch.texts, len(batch.texts["query"])
        h, text_logprob = self.embed(texts["query"] + texts["positive"] + texts["negative"])
        q, p, n = h[:B, None], h[B : 2 * B, None], h[2 * B :].view(B, -1, 1, h.shape[-1])  # [B, 1, D] x 2, [B, M, 1, D]
        contrast = infonce(q, p, t, n, batch.same_text) + infonce(p, q, t, None, batch.same_text)
        return -contrast.mean() / 2 - self.config.text_weight * text_logprob.mean()


class SimCSE(LossTrainer):
    """Gao et al. 2021, unsupervised: two embeddings of a text under different dropout are its positive pair.

    Decoder-only backbones are built without dropout, and a policy stays in eval mode. So this class brings its own
    dropout, on the input embeddings and in training alone. What is dropped is a function of seed, step and view.
    """

    DROPOUT = 0.1

    def loss(self, batch):
        """The mean negative log-softmax of a text's own second view among the batch's second views."""
        (one, text_logprob), (two, _) = (self.view(batch.texts["text"], number) for number in range(2))
        contrast = infonce(one[:, None], two[:, None], self.config.infonce_temperature, None, batch.same_text)
        return -contrast.mean() - self.config.text_weight * text_logprob.mean()

    def view(self, texts, number):
        """`embed` under dropout; a view of another number has other inputs dropped."""

        def drop(module, inputs, output):
            chance = uniforms([self.config.seed, self.step_number, 4, number], *output.shape, device=output.device)
            return output * (chance >= self.DROPOUT) / (1 - self.DROPOUT)

        handle = self.policy.network.get_input_embeddings().register_forward_hook(drop)
        try:  # every row reads the instruction by itself: read once for all, it would share its dropout
            return self.embed(texts, share=False)
        finally:
            handle.remove()


class ForcedContrastive(Contrastive):
    """The same loss over texts to which a rationale is forced: the longest of eight that the start draws (see `longest`)."""

    def __init__(self, policy, reference, rows, config):
        super().__init__(policy, reference, rows, config)
        # Not the policy as it is: a resumed run has trained it already.
        self.start = reference or Policy.load(config.model, config.device, config.dtype, **config.reading).freeze()

    def embed(self, texts, share=True):
        """P(x) and its forced rationale pooled, and the mean log-probability of the text. `-> [n, D], [n]`."""
        scores = score(self.policy, longest(self.start, texts, [self.config.seed, self.step_number, 5]))
        return scores.embeddings[:, 0], scores.text_logprobs


def longest(policy, texts, seed, K=8):
    """Of K rationales drawn at temperature 1 about each text the longest that ended; in the town it nearly always thinks.

    `-> Rollouts` of n texts with one rationale each.
    """
    chance = uniforms(seed, len(texts), K, policy.reading.max_new_tokens, device=policy.device)
    drawn = sample(policy, policy.template(texts), K, 1.0, chance)
    at = torch.arange(len(texts), device=policy.device), (drawn.mask.sum(-1) * drawn.finished).argmax(1)
    parts = ("ids", "mask", "logprobs", "embeddings", "finished")
    return dataclasses.replace(drawn, **{name: getattr(drawn, name)[at][:, None] for name in parts})


class PathwiseAlone(Trainer):
    """The reward's own gradient without GRPO: rationales are drawn, and nothing says which of them were better."""

    def advantage(self, R, batch):
        return torch.zeros_like(R)


BASELINES = {
    "contrastive": Contrastive,
    "forced": ForcedContrastive,
    "simcse": SimCSE,
    "pathwise": PathwiseAlone,
}
