"""Texts to vectors, each text read once: the policy as an encoder with a memory on disk.

The memory is one SQLite file for one way of reading: the weights, the instruction, the limits, the
pooling, the decoding. Another of any of these is another file. A batch is written in one transaction,
so an encoder that is killed has lost at most the batch it was writing.
"""

import dataclasses
import hashlib
import json
import os
import sqlite3

import numpy as np
import torch
from tqdm import tqdm

from data import GraceError
from metrics import normalize
from policy import Policy
from rollout import batches, encode_batch


def fingerprint(model):
    """A hash of every weight: two models with the same one embed alike."""
    digest = hashlib.sha256()
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
            model = Policy.load(model, device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype, **reading)
        self.policy, self.temperature, self.seed, self.rationale = model, temperature, seed, rationale
        self.tokens_per_batch, self.progress = tokens_per_batch, progress
        self.asked, self.read, self.seen = 0, 0, {}
        self.settings = {
            "fingerprint": fingerprint(model.model),
            **dataclasses.asdict(model.reading),
            "template": [model.prefix, model.suffix],
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
        """What is known of these texts: {text: (vector, rationale, cut, finished)}. Asks 500 keys at a time."""
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

    def _know(self, texts):
        """Read what is not known yet, a batch a transaction. Returns what is known of every text then."""
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise GraceError(f"text {i} is {text!r:.60}, not a string")
        if not texts:
            raise GraceError("no texts to encode")
        self.asked += len(texts)
        distinct = list(dict.fromkeys(texts))
        known = self._remembered(distinct)
        new = [text for text in distinct if text not in known]
        bar = tqdm(total=len(new), unit="text", desc="reading", disable=not self.progress or not new, leave=False)
        for part in batches(new, self.tokens_per_batch, self.policy):
            group, generator = [new[i] for i in part], None
            if self.temperature:  # a batch's own seed, so that a stopped run draws what it would have drawn
                seed = hashlib.sha256(json.dumps([self.seed, group]).encode()).digest()[:8]
                generator = torch.Generator(self.policy.device).manual_seed(int.from_bytes(seed, "big") >> 1)
            found = encode_batch(self.policy, group, self.temperature, generator, self.rationale)
            if bad := [t for t, v in zip(group, found.vectors) if not np.isfinite(v).all()]:
                raise GraceError(f"the embedding of {bad[0][:80]!r} is not finite: the model or its dtype is broken")
            rows = list(zip(found.vectors, found.rationales, found.cut.tolist(), found.finished.tolist()))
            known.update(zip(group, rows))
            with self.memory:  # one transaction: all of the batch or none of it
                self.memory.executemany(
                    "INSERT OR REPLACE INTO texts VALUES (?, ?, ?, ?, ?)",
                    ((_key(text), vector.tobytes(), *more) for text, (vector, *more) in zip(group, rows)),
                )
            bar.update(len(group))
        bar.close()
        self.read += len(new)
        self.seen.update((_key(text), (not text.strip(), cut, not finished)) for text, (_, _, cut, finished) in known.items())
        if len(sizes := {len(vector) for vector, *_ in known.values()}) != 1:
            raise self._damaged(f"vectors of {sorted(sizes)} dimensions")
        return known

    def encode(self, texts):
        """`list[str] -> [n, D]` float32, unit length."""
        texts = list(texts)
        known = self._know(texts)
        return np.stack([known[text][0] for text in texts])

    def rationales(self, texts):
        """`list[str] -> list[str]`: what the policy wrote about each text; empty where it writes none."""
        texts = list(texts)
        known = self._know(texts)
        return [known[text][1] for text in texts]

    @property
    def counts(self):
        """Texts asked for, and distinct ones: read now, remembered, empty, cut at the limit, rationale unfinished."""
        empty, cut, unfinished = (sum(flags) for flags in zip(*self.seen.values())) if self.seen else (0, 0, 0)
        distinct = {"distinct": len(self.seen), "read": self.read, "remembered": len(self.seen) - self.read}
        return {"asked": self.asked, **distinct, "empty": empty, "cut": cut, "unfinished": unfinished}


def _key(text):
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class MeanEncoder:
    """Several encoders as one: the mean of their unit vectors, at unit length again."""

    def __init__(self, encoders):
        self.encoders = encoders

    def encode(self, texts):
        """`list[str] -> [n, D]` float32."""
        return normalize(np.mean([encoder.encode(texts) for encoder in self.encoders], 0)).astype(np.float32)
