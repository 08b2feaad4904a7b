"""What GRACE is compared with: contrastive fine-tuning and SimCSE, with the same policy, pooling, data and evaluation.

Base is P(x) pooled, Base with reasoning the untrained policy's rationale with it: nothing is trained, so nothing is
written here (`evaluate_triplets`, without and with rationale). The two that are trained are Trainers with a step of
their own: they read no rationale, and what is a reward in GRACE is their loss. A third takes GRPO out of GRACE.

Shapes: B instances, M hard negatives, D hidden size.
"""

import time

import torch

from grace import Trainer, batch_roles
from pool import fold, unit
from reward import infonce
from rollout import text_logprobs


class LossTrainer(Trainer):
    """One AdamW step on a loss of the prompts' embeddings."""

    def step(self):
        """One step. Returns its metrics."""
        start = time.perf_counter()
        self.set_rate()
        texts, twins = batch_roles(self.batch())
        loss = self.loss(texts, twins.to(self.policy.device))
        loss.backward()
        norm = self.descend()
        self.step_number += 1
        metrics = {"step": self.step_number, "loss": loss.detach(), "reward": -loss.detach(), "length": 0, "distinct": 0}
        return {name: float(x) for name, x in (metrics | {"grad_norm": norm, "step_s": time.perf_counter() - start}).items()}

    def read(self, texts, share=True):
        """P(x) pooled, and the mean log-probability of its text, with gradients. `-> [n, D], [n]`."""
        policy, x = self.policy, self.policy.prompts(texts, share)
        hidden, to_pool, _ = policy.prefill(x.ids, x.mask, x.shared)
        ids, counted = x.ids[:, x.shared :], x.counted[:, x.shared :]
        return unit(fold(None, to_pool, counted, policy.reading.pooling)), text_logprobs(policy, hidden, ids, counted)


class Contrastive(LossTrainer):
    """InfoNCE as the loss (Oord et al. 2018): query to the batch's positives and own hard negatives, positive to queries.

    The very function that GRACE is rewarded with, over one embedding a text, at the temperature that suits a loss.
    """

    def loss(self, texts, twins):
        """The mean negative log-softmax of both directions, in nats, and the text term where it is asked for."""
        t, B = self.config.infonce_temperature, len(texts["query"])
        h, said = self.read(texts["query"] + texts["positive"] + texts["negative"])
        q, p, n = h[:B, None], h[B : 2 * B, None], h[2 * B :].view(B, -1, 1, h.shape[-1])  # [B, 1, D] x 2, [B, M, 1, D]
        contrast = infonce(q, p, t, n, twins) + infonce(p, q, t, None, twins)
        return -contrast.mean() / 2 - self.config.text_weight * said.mean()


class SimCSE(LossTrainer):
    """Gao et al. 2021, unsupervised: two readings of a text under different dropout are its positive pair.

    Decoder-only backbones are built without dropout, and a policy stays in eval mode. So the dropout is ours: on the
    input embeddings, in training alone, from the run's own generator.
    """

    DROPOUT = 0.1

    def loss(self, texts, twins):
        """The mean negative log-softmax of the own second view among the batch's second views."""
        handle = self.policy.model.get_input_embeddings().register_forward_hook(self.drop)
        try:  # the instruction is read anew in every row: sharing it would share its dropout
            (one, said), (two, _) = (self.read(texts["text"], share=False) for _ in range(2))
        finally:
            handle.remove()
        contrast = infonce(one[:, None], two[:, None], self.config.infonce_temperature, None, twins)
        return -contrast.mean() - self.config.text_weight * said.mean()

    def drop(self, module, inputs, output):
        """Dropout as a forward hook."""
        kept = torch.rand(output.shape, generator=self.generator, device=output.device) >= self.DROPOUT
        return output * kept / (1 - self.DROPOUT)


class PathwiseAlone(Trainer):
    """The reward's own gradient without GRPO: rationales are drawn, and nothing says which of them were better."""

    def advantage(self, R, rollouts, texts, embeddings, twins):
        return torch.zeros_like(R)
