"""Texts to vectors: the policy as an encoder, in batches, and with a memory on disk.

`encode_texts` reads a list of texts with a policy. `GraceEncoder` does so for evaluation, and remembers what it has
read in one SQLite file per way of reading: the weights, the instruction, the limits, the pooling, the decoding. If
any of these differs, it is another file. A batch is written in one transaction, so an encoder that is killed has lost
at most the batch it was writing.
"""

import dataclasses
import hashlib
import json
import os
import sqlite3
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from evaluation.metrics import normalize
from plumbing.errors import GraceError
from policy import Policy
from pool import fold, unit
from rollout import sample, token_logprobs, uniforms

# ---------------------------------------------------------------- in batches, without a memory


@dataclass
class Encoded:
    """Texts as vectors, and what was written about them; one entry per text."""

    vectors: np.ndarray  # [n, D] float32, unit length
    rationales: list  # of str; empty where none was written
    cut: np.ndarray  # [n] bool, the text lost its end to the prompt limit
    finished: np.ndarray  # [n] bool, the rationale came to an end token


def token_batches(texts, tokens_per_batch, policy):
    """Indices of the texts, longest first, in batches that fit the token budget, one rationale each.

    A text's tokens are estimated, at three bytes each, so that no text is tokenized twice.
    """
    size = [len(text.encode("utf-8", "surrogatepass")) for text in texts]
    overhead = len(policy.template.prefix) // 4 + policy.reading.max_new_tokens
    limit, part = policy.reading.max_prompt_tokens, []
    for i in sorted(range(len(texts)), key=lambda i: -size[i]):
        longest = min(limit, size[part[0] if part else i] // 3) + overhead
        if part and (len(part) + 1) * longest > tokens_per_batch:
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def embed_prompts(policy, prompts):
    """The embedding without a rationale: P(x) alone, pooled (the paper's Base). `-> [N, D]`."""
    with torch.no_grad():
        _, to_pool, _ = policy.prefill(prompts.ids, prompts.mask, prompts.n_shared)
        return unit(fold(None, to_pool, prompts.counted[:, prompts.n_shared :], policy.reading.pooling))


@torch.inference_mode()
def encode_batch(policy, texts, temperature=0.0, seed=0, rationale=True):
    """One batch of texts, greedy or sampled, or the prompts alone. `-> Encoded`.

    What is sampled about a text depends on seed and text alone, not on the batch it is in. An empty text is
    allowed: its prompt still has tokens that count.
    """
    prompts = policy.template(texts)
    if not rationale:
        vectors, rationales, finished = embed_prompts(policy, prompts), [""] * len(texts), np.ones(len(texts), bool)
    else:
        T, uniform = policy.reading.max_new_tokens, None
        if temperature:
            uniform = torch.stack([uniforms([seed, *_key(text)], 1, T, device=policy.device) for text in texts])  # [n, 1, T]
        rollouts = sample(policy, prompts, 1, temperature, uniform)
        vectors, finished = rollouts.embeddings[:, 0], rollouts.finished[:, 0].cpu().numpy()
        ids = [group[0] for group in rollouts.rationales()]
        rationales = [text.strip() for text in policy.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return Encoded(vectors.float().cpu().numpy(), rationales, prompts.cut.cpu().numpy(), finished)


def encode_distinct(policy, texts, temperature=0.0, seed=0, rationale=True, tokens_per_batch=8192):
    """Distinct texts, a batch at a time. Yields `{text: (vector [D], rationale, cut, finished)}` per batch.

    Several ranks share out the batches, which are those of one process: so are the vectors, to the bit. A batch for which
    the memory is too small is read in halves. Raises GraceError where it is too small for one text.
    """

    def encoded(indices):
        batch = [texts[i] for i in indices]
        try:
            x = encode_batch(policy, batch, temperature, seed, rationale)
            return dict(zip(batch, zip(x.vectors, x.rationales, x.cut.tolist(), x.finished.tolist())))
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise GraceError("out of memory with one text: lower --max-new-tokens or --max-prompt-tokens") from error
        if torch.cuda.is_available():  # out here the exception no longer keeps the tensors alive
            torch.cuda.empty_cache()
        print(f"out of memory while reading {len(batch)} texts: reading them in halves")
        half = len(batch) // 2
        return encoded(indices[:half]) | encoded(indices[half:])

    yield from map(encoded, token_batches(texts, tokens_per_batch, policy))


def encode_texts(policy, texts, **options):
    """Any number of texts; equal ones are read once. `-> Encoded`. options: see `encode_distinct`; greedy by default."""
    known = {}
    for batch in encode_distinct(policy, list(dict.fromkeys(texts)), **options):
        known |= batch
    vectors, rationales, cut, finished = zip(*(known[text] for text in texts))
    return Encoded(np.stack(vectors), list(rationales), np.array(cut), np.array(finished))


@torch.no_grad()
def text_loss(policy, texts, tokens_per_batch=8192):
    """How well the policy still models language: its loss, nats per token, on the texts' own tokens.

    The texts stand where they stand in P(x). What training takes from the model shows here, but only as far as texts like
    these go: a text term (--text-weight) trains this very loss on the training texts.
    """

    def loss(part):
        # Not shared: the text's first token is predicted by the instruction's last.
        prompts = policy.template([texts[i] for i in part], share=False)
        hidden, _, _ = policy.prefill(prompts.ids, prompts.mask, 0)
        keep = prompts.text[:, 1:].bool()
        return -float(token_logprobs(policy, hidden[:, :-1][keep], prompts.ids[:, 1:][keep]).sum()), int(keep.sum())

    nats, count = map(sum, zip(*map(loss, token_batches(texts, tokens_per_batch, policy))))
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


class GraceEncoder:
    """`encode(texts)` gives `[n, D]` float32, `rationales(texts)` what was written about each.

    model        a checkpoint folder, hub id, or Policy
    temperature  0 is greedy; above it rationales are sampled, with `seed`
    rationale    False embeds the prompt alone: the paper's Base
    cache        a folder for the memory, or None to keep it in this process only
    reading      instruction, max_prompt_tokens, max_new_tokens, pooling: default as the checkpoint says

    Equal texts get equal vectors. An empty text is embedded (its prompt still has tokens that count)
    and counted. Raises GraceError for a text that is no string and for a vector with NaN in it.
    """

    def __init__(
        self, model, cache=None, temperature=0.0, seed=0, rationale=True, tokens_per_batch=8192,
        device=None, dtype="float32", progress=False, **reading,
    ):  # fmt: skip
        if temperature < 0:
            raise GraceError(f"temperature {temperature}: give 0 for greedy decoding, or more to sample")
        if isinstance(model, Policy) and (reading or device or dtype != "float32"):
            raise GraceError("a Policy brings its own reading, device and dtype: give them to Policy.load instead")
        if not isinstance(model, Policy):
            model = Policy.load(model, device or ("cuda" if torch.cuda.is_available() else "cpu"), **reading)
            if dtype == "bfloat16":  # weights in it, too: they are only read here, and rounding them per token costs more
                model = model.frozen_copy(torch.bfloat16)
        self.policy, self.temperature, self.seed, self.rationale = model, temperature, seed, rationale
        self.tokens_per_batch, self.progress = tokens_per_batch, progress
        self.n_requested, self.n_read, self.flags = 0, 0, {}
        self.settings = {
            "fingerprint": fingerprint(model.model),
            **dataclasses.asdict(model.reading),
            "template": [model.prompts.prefix, model.prompts.suffix],
            "end_tokens": model.end_ids.tolist(),
            "rationale": rationale,
            "temperature": temperature,
            "seed": seed if temperature else None,
            "dtype": model.dtype,
        }
        name = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]
        self.path = ":memory:" if cache is None else os.path.join(cache, f"{name}.sqlite")
        try:
            if cache is not None:
                os.makedirs(cache, exist_ok=True)
            self.memory = sqlite3.connect(self.path, timeout=60)
            self.memory.execute(
                "CREATE TABLE IF NOT EXISTS texts (key BLOB PRIMARY KEY, vector BLOB, rationale TEXT, cut INT, finished INT)"
            )
            self.memory.execute("SELECT count(*) FROM texts").fetchone()
        except sqlite3.OperationalError as error:
            raise GraceError(f"{self.path}: cannot be opened ({error}); give another cache folder") from error
        except OSError as error:
            raise GraceError(f"{cache}: cannot be a cache folder ({error.strerror})") from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error

    def _damaged(self, error):
        return GraceError(f"{self.path}: damaged cache ({error}). Delete the file; its texts will be read again.")

    def _remembered(self, texts):
        """The texts that the memory has: `{text: (vector, rationale, cut, finished)}`. Looks up 500 keys at a time."""
        keys, known = {_key(text): text for text in texts}, {}
        pending = list(keys)
        try:
            for start in range(0, len(pending), 500):
                part = pending[start : start + 500]
                query = f"SELECT * FROM texts WHERE key IN ({','.join('?' * len(part))})"
                for key, vector, rationale, cut, finished in self.memory.execute(query, part):
                    known[keys[key]] = (np.frombuffer(vector, np.float32), rationale, cut, finished)
        except (sqlite3.DatabaseError, ValueError) as error:
            raise self._damaged(error) from error
        return known

    def _read(self, texts):
        """Every text's `(vector, rationale, cut, finished)`; the unknown ones are read, a batch at a time."""
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise GraceError(f"text {i} is {text!r:.60}, not a string")
        if not texts:
            raise GraceError("no texts to encode")
        self.n_requested += len(texts)
        distinct = list(dict.fromkeys(texts))
        known = self._remembered(distinct)
        new = [text for text in distinct if text not in known]
        hidden = not (self.progress and new)
        bar = tqdm(total=len(new), unit="text", desc="reading", disable=hidden, leave=False)
        options = self.temperature, self.seed, self.rationale, self.tokens_per_batch
        for batch in encode_distinct(self.policy, new, *options):
            if bad := [text for text, (vector, *_) in batch.items() if not np.isfinite(vector).all()]:
                raise GraceError(f"the embedding of {bad[0][:80]!r} is not finite: the model or its dtype is broken")
            known |= batch
            rows = ((_key(text), vector.tobytes(), *more) for text, (vector, *more) in batch.items())
            try:
                with self.memory:  # one transaction: all of the batch or none of it
                    self.memory.executemany("INSERT OR REPLACE INTO texts VALUES (?, ?, ?, ?, ?)", rows)
            except sqlite3.OperationalError as error:
                raise GraceError(
                    f"{self.path}: cannot be written ({error}); make room, or give another cache folder"
                ) from error
            bar.update(len(batch))
        bar.close()
        self.n_read += len(new)
        self.flags |= {_key(text): (not text.strip(), cut, not finished) for text, (_, _, cut, finished) in known.items()}
        if len(sizes := {len(vector) for vector, *_ in known.values()}) != 1:
            raise self._damaged(f"vectors of {sorted(sizes)} dimensions")
        return known

    def encode(self, texts):
        """`list[str] -> [n, D]` float32, unit length."""
        texts = list(texts)
        known = self._read(texts)
        return np.stack([known[text][0] for text in texts])

    def rationales(self, texts):
        """`list[str] -> list[str]`: what the policy wrote about each text; empty where it writes none."""
        texts = list(texts)
        known = self._read(texts)
        return [known[text][1] for text in texts]

    @property
    def counts(self):
        """Texts requested, and distinct ones: read now, remembered, empty, cut at the limit, rationale unfinished."""
        empty, cut, unfinished = (sum(flags) for flags in zip(*self.flags.values())) if self.flags else (0, 0, 0)
        distinct = {"distinct": len(self.flags), "read": self.n_read, "remembered": len(self.flags) - self.n_read}
        return {"requested": self.n_requested, **distinct, "empty": empty, "cut": cut, "unfinished": unfinished}


def _key(text):
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class MeanEncoder:
    """Several encoders as one: the mean of their unit vectors, at unit length again."""

    def __init__(self, encoders):
        self.encoders = encoders

    def encode(self, texts):
        """`list[str] -> [n, D]` float32."""
        return normalize(np.mean([encoder.encode(texts) for encoder in self.encoders], 0)).astype(np.float32)
