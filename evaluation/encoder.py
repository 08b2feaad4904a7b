"""Texts to vectors: the policy as an encoder, in batches, and with a memory on disk.

`encode_texts` reads a list of texts with a policy. `GraceEncoder` does so for evaluation, and remembers what it has
read in one SQLite file per way of reading: the weights, the instruction, the limits, the pooling, the decoding. If
any of these differs, it is another file. A batch is written in one transaction, so an encoder that is killed loses at
most the batch it was reading.

Shapes: n texts, D hidden size.
"""

import dataclasses
import functools
import hashlib
import json
import os
import sqlite3
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from plumbing.errors import GraceError
from plumbing.models import pick_device
from policy import Policy
from pool import fold, unit
from rollout import sample, token_logprobs, uniforms

# ---------------------------------------------------------------- in batches, without a memory


class Encoded(NamedTuple):
    """Texts as vectors, and what was written about them; one entry per text."""

    vectors: np.ndarray  # [n, D] float32, unit length
    rationales: list  # of str; empty where none was written
    cut: np.ndarray  # [n] bool, the text lost its end to the prompt limit
    finished: np.ndarray  # [n] bool, the rationale came to an end token


def token_batches(texts, tokens_per_batch, policy):
    """The texts, longest first, in batches that fit the token budget with one rationale each. Yields lists of texts.

    A text's tokens are estimated, at three bytes each, so that no text is tokenized twice.
    """
    overhead = len(policy.template.prefix) // 4 + policy.reading.max_new_tokens
    size = lambda text: len(text.encode("utf-8", "surrogatepass")) * (1 + policy.reading.twice)
    cost = lambda text: min(policy.reading.max_prompt_tokens, size(text) // 3) + overhead
    batch = []
    for text in sorted(texts, key=size, reverse=True):
        if batch and (len(batch) + 1) * cost(batch[0]) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


@torch.inference_mode()
def encode_batch(policy, texts, temperature=0.0, seed=0, rationale=True):
    """One batch of texts, greedy or sampled, or the prompts alone (the paper's Base): `[(vector, rationale, cut, finished)]`.

    What is sampled about a text depends on seed and text alone, not on the batch it is in. An empty text is
    allowed: its prompt still has tokens that count.
    """
    prompts = policy.template(texts)
    if rationale:
        T, uniform = policy.reading.max_new_tokens, None
        if temperature:
            uniform = torch.stack([uniforms([seed, *_key(text)], 1, T, device=policy.device) for text in texts])  # [n, 1, T]
        rollouts = sample(policy, prompts, 1, temperature, uniform)
        vectors, finished = rollouts.embeddings[:, 0], rollouts.finished[:, 0].tolist()
        ids = [group[0] for group in rollouts.rationales()]
        rationales = [text.strip() for text in policy.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    else:
        _, to_pool, _ = policy.prefill(prompts.ids, prompts.mask, prompts.n_shared)
        vectors = unit(fold(None, to_pool, prompts.counted[:, prompts.n_shared :], policy.reading.pooling))
        rationales, finished = [""] * len(texts), [True] * len(texts)
    return list(zip(vectors.float().cpu().numpy(), rationales, prompts.cut.tolist(), finished))


def encode_texts(policy, texts, temperature=0.0, seed=0, rationale=True, tokens_per_batch=8192):
    """Any number of texts, greedy by default; equal ones are read once. `-> Encoded`."""
    known = {}
    for batch in token_batches(dict.fromkeys(texts), tokens_per_batch, policy):
        known |= zip(batch, encode_batch(policy, batch, temperature, seed, rationale))
    vectors, rationales, cut, finished = zip(*(known[text] for text in texts))
    return Encoded(np.stack(vectors), list(rationales), np.array(cut), np.array(finished))


@torch.no_grad()
def text_loss(policy, texts, tokens_per_batch=8192):
    """How well the policy still models language: its loss, nats per token, on the texts' own tokens.

    The texts stand where they stand in P(x). What training takes from the model shows here, but only as far as texts like
    these go: a text term (--text-weight) trains this very loss on the training texts.
    """
    nats, count = 0.0, 0
    for batch in token_batches(texts, tokens_per_batch, policy):
        # Not shared: the text's first token is predicted by the instruction's last.
        prompts = policy.template(batch, share=False)
        hidden, _, _ = policy.prefill(prompts.ids, prompts.mask, 0)
        keep = prompts.text[:, 1:].bool()
        nats -= float(token_logprobs(policy, hidden[:, :-1][keep], prompts.ids[:, 1:][keep]).sum())
        count += int(keep.sum())
    return nats / count


# ---------------------------------------------------------------- with a memory on disk


UNREAD = "_name_or_path", "architectures", "dtype", "transformers_version"  # of a model's configuration: they change no number


def fingerprint(model):
    """A hash of the configuration and of every weight: two models with the same one embed alike."""
    about = {k: v for k, v in model.config.to_dict().items() if k not in UNREAD}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + str(tuple(weight.shape)).encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _key(text):
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class GraceEncoder:
    """`encode(texts)` gives `[n, D]` float32, `rationales(texts)` what was written about each.

    model        a checkpoint folder, hub id, or Policy
    temperature  0 is greedy; above it rationales are sampled, with `seed`
    rationale    False embeds the prompt alone: the paper's Base
    cache        a folder for the memory, or None to keep it in this process only
    reading      instruction, max_prompt_tokens, max_new_tokens, pooling, documents, twice: default as the checkpoint says

    Equal texts get equal vectors. An empty text is embedded: its prompt still has tokens that count. `name` and `revision`
    say who reads: the revision is another one if a weight or any setting that changes a vector is.
    """

    def __init__(
        self, model, cache=None, temperature=0.0, seed=0, rationale=True, tokens_per_batch=8192,
        device=None, dtype=None, progress=False, **reading,
    ):  # fmt: skip
        if not 0 <= temperature < np.inf or seed < 0:
            raise GraceError(
                f"temperature {temperature}, seed {seed}: give 0 for greedy decoding, more to sample, by a seed >= 0"
            )
        if not isinstance(model, Policy):
            model = Policy.load(model, pick_device(device), dtype, **reading).freeze()
        elif reading or device or dtype:
            raise GraceError("a Policy brings its reading, device and dtype: give them to Policy.load, or see Policy.reads")
        self.policy, self.options = model, (temperature, seed, rationale)
        self._same = dict(cache=cache, tokens_per_batch=tokens_per_batch, progress=progress)
        self.tokens_per_batch, self.progress = tokens_per_batch, progress
        self.n_requested, self.n_read, self.flags = 0, 0, {}  # flags: {key: (cut, finished)}
        self.settings = {
            "fingerprint": fingerprint(model.model),
            **dataclasses.asdict(model.reading),
            "template": [model.template.prefix, model.template.suffix],
            "end_tokens": model.end_ids.tolist(),
            "rationale": rationale,
            "temperature": temperature,
            "seed": seed if temperature else None,
            "dtype": model.dtype,
        }
        self.name = source = model.model.name_or_path
        if source.count("/") != 1 or os.path.isdir(source):  # a hub id has an owner; a folder gets one
            self.name = f"grace/{os.path.basename(source.rstrip('/'))}"
        self.revision = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]
        self.path = ":memory:"
        if cache is not None:
            os.makedirs(cache, exist_ok=True)
            self.path = os.path.join(cache, f"{self.revision}.sqlite")
        # One thread at a time may use it, whichever that is: a web demo has threads of its own.
        self.memory = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
        self.memory.execute(
            "CREATE TABLE IF NOT EXISTS texts (key BLOB PRIMARY KEY, vector BLOB, rationale TEXT, cut INT, finished INT)"
        )

    def _read(self, texts):
        """`{text: (vector, rationale, cut, finished)}`: from the memory, and what it does not have a batch at a time."""
        known, distinct = {}, list(dict.fromkeys(texts))
        for text in distinct:
            if row := self.memory.execute("SELECT * FROM texts WHERE key = ?", [_key(text)]).fetchone():
                known[text] = (np.frombuffer(row[1], np.float32), *row[2:])
        new = [text for text in distinct if text not in known]
        with tqdm(total=len(new), unit="text", desc="reading", disable=not (self.progress and new), leave=False) as bar:
            for batch in token_batches(new, self.tokens_per_batch, self.policy):
                encoded = dict(zip(batch, encode_batch(self.policy, batch, *self.options)))
                rows = [(_key(text), vector.tobytes(), *more) for text, (vector, *more) in encoded.items()]
                with self.memory:  # one transaction: all of the batch or none of it
                    self.memory.executemany("INSERT OR REPLACE INTO texts VALUES (?, ?, ?, ?, ?)", rows)
                known |= encoded
                bar.update(len(batch))
        self.n_requested += len(texts)
        self.n_read += len(new)
        self.flags |= {_key(text): flags for text, (_, _, *flags) in known.items()}
        return known

    def encode(self, texts):
        """`list[str] -> [n, D]` float32, unit length; one `str -> [D]`."""
        if isinstance(texts, str):
            return self.encode([texts])[0]
        if len(texts) == 0:
            return np.zeros((0, self.policy.model.config.get_text_config().hidden_size), np.float32)
        known = self._read(texts)
        return np.stack([known[text][0] for text in texts])

    encode_query = encode

    def encode_document(self, texts):
        """`encode` for texts that are searched: by the prompt alone where the checkpoint's `documents` says so."""
        return (self if self.policy.reading.documents == "rationale" else self._reader).encode(texts)

    @functools.cached_property
    def _reader(self):
        """The encoder of documents that are read and not written about."""
        return GraceEncoder(self.policy, rationale=False, **self._same)

    def rationales(self, texts):
        """`list[str] -> list[str]`: what the policy wrote about each text, empty where it writes none; one `str -> str`."""
        if isinstance(texts, str):
            return self.rationales([texts])[0]
        known = self._read(texts)
        return [known[text][1] for text in texts]

    @property
    def counts(self):
        """Texts requested; of the distinct ones those read now, remembered, cut at the limit, with an unfinished rationale."""
        cut, finished = (sum(flags[i] for flags in self.flags.values()) for i in (0, 1))
        distinct = len(self.flags)
        counts = {"requested": self.n_requested, "distinct": distinct, "read": self.n_read}
        return counts | {"remembered": distinct - self.n_read, "cut": cut, "unfinished": distinct - finished}
