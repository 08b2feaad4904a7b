"""The method's reading side in one file of its own, which sentence-transformers opens: prompt, rationale, mean, unit length.

    from sentence_transformers import SentenceTransformer
    from evaluation.sentence_transformer import GraceModule

    model = SentenceTransformer(modules=[GraceModule("runs/mine")])
    model.save("shared")  # a folder that opens without this repository:
    model = SentenceTransformer("shared", trust_remote_code=True)
    vectors = model.encode(["a text", "another"])

This file needs torch and transformers and nothing of this repository, because a copy of it lies in each saved folder. (The
flag lets sentence-transformers run that copy.) It gives the embeddings of `GraceEncoder`. What it leaves out is what makes
`GraceEncoder` fast: the instruction is read with every prompt, and rollouts that have ended stay in the batch.

A prompt of sentence-transformers (`encode(texts, prompt="query: ")`) stands before the text and belongs to it. Two things
more: `encode(texts, rationale=False)` embeds the prompt alone, and `encode(texts, output_value=None)` also returns what was
written, as `rationale_ids`.

Shapes: N texts, P prompt positions, D hidden size.
"""

import inspect
import json
import os
import shutil

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import cached_file

SETTINGS, COPY = "grace_config.json", "grace_module"


def unreadable(reading):
    """Why this file cannot read as a checkpoint of this reading does; None if it can."""
    if reading.get("pooling", "mean") not in ("mean", "halves"):
        return f"pooling {reading['pooling']}; only mean and halves are read here"
    if reading.get("twice"):
        return "a text is read twice; here it is read once"


class GraceModule(torch.nn.Module):
    """A trained checkpoint, from a folder or the hub, as the one module of a SentenceTransformer.

    model_kwargs and hub go to `from_pretrained`. Raises ValueError for a pooling other than mean and halves, and for a
    checkpoint that reads its texts twice.
    """

    __module__ = COPY  # the name under which modules.json finds the class: that of the copy in a saved folder
    save_in_root, forward_kwargs = True, {"rationale", "task"}

    def __init__(self, folder, model_kwargs=None, **hub):
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **hub)
        self.model = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **(model_kwargs or {})}, **hub)
        with open(cached_file(folder, SETTINGS, **hub), encoding="utf-8") as file:
            self.reading = json.load(file)
        if reason := unreadable(self.reading):
            raise ValueError(f"{folder}: {reason}")
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
        self.max_seq_length = min(self.reading["max_prompt_tokens"], context - self.reading["max_new_tokens"])
        of_model = self.model.generation_config.eos_token_id, getattr(self.model.config, "eos_token_id", None)
        ends = [i for ids in (*of_model, self.tokenizer.eos_token_id) for i in (ids if isinstance(ids, list) else [ids])]
        self.register_buffer("end_ids", torch.tensor(sorted(set(ends) - {None})), persistent=False)
        # Ids that the template may write and a text may not: a text is data, whatever its characters spell.
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self.control = (special | set(self.tokenizer.all_special_ids)) - {self.tokenizer.unk_token_id}
        # transformers called this argument past_key_values until 5.24.
        named = "cache" in inspect.signature(self.model.base_model.forward).parameters
        self.cache_name = "cache" if named else "past_key_values"
        self.as_system = True
        if self.reading["instruction"].strip() not in self.chat("x"):  # no system role: it opens the user's message
            self.as_system = False
        one, two = self.chat("x"), self.chat("y")
        self.prefix = os.path.commonprefix([one, two])
        self.suffix = os.path.commonprefix([one[::-1], two[::-1]])[::-1]

    # ------------------------------------------------------------ from texts to prompts (Eq. 9)

    def chat(self, text):
        """P(x) as a string: the chat template's rendering of instruction and text. Empty if it refuses a system message."""
        instruction, tokenizer = self.reading["instruction"], self.tokenizer
        if tokenizer.chat_template is None:
            return f"{tokenizer.bos_token or ''}{instruction}\n\nText: {text}\n\nRationale:"
        chat = [{"role": "user", "content": text if self.as_system else f"{instruction}\n\n{text}"}]
        chat = [{"role": "system", "content": instruction}, *chat] if self.as_system else chat
        try:
            return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024")
        except Exception:  # the template refuses the system role; if it is anything else, it is raised without one
            if self.as_system:
                return ""
            raise

    def tokens(self, text):
        """A prompt's ids, and how many of its first tokens do not count: the instruction. A long text loses its end."""
        options = dict(add_special_tokens=False, return_offsets_mapping=True)
        string = self.chat(text)
        first, last = len(self.prefix), len(string) - len(self.suffix)
        ids, spans = (self.tokenizer(string, **options)[name] for name in ("input_ids", "offset_mapping"))
        before, after = sum(end <= first for _, end in spans), sum(start >= last for start, _ in spans)
        if self.control.intersection(ids[before : len(ids) - after]):  # the text spells a control token: read its characters
            pieces = (self.prefix, False), (string[first:last], True), (self.suffix, False)
            parts = [self.tokenizer(s, **options, split_special_tokens=is_text)["input_ids"] for s, is_text in pieces]
            parts[1] = [self.tokenizer.unk_token_id if i in self.control else i for i in parts[1]]
            ids, before, after = sum(parts, []), len(parts[0]), len(parts[2])
        if (excess := len(ids) - self.max_seq_length) > 0:
            if before + after >= self.max_seq_length:
                raise ValueError(f"a limit of {self.max_seq_length} tokens leaves no room for a text")
            ids = ids[: len(ids) - after - excess] + ids[len(ids) - after :]
        return ids, before

    def preprocess(self, inputs, prompt=None, **_):
        """Texts as prompts with padding on the left, so that each ends at -1. `-> {name: [N, P]}`."""
        rows = [self.tokens((prompt or "") + text) for text in inputs]
        P = max(len(ids) for ids, _ in rows)
        left = lambda rows: torch.tensor([[0] * (P - len(row)) + row for row in rows])
        mask, counted = ([[1] * len(ids) for ids, _ in rows], [[0] * n + [1] * (len(ids) - n) for ids, n in rows])
        return {"input_ids": left([ids for ids, _ in rows]), "attention_mask": left(mask), "counted": left(counted)}

    # ------------------------------------------------------------ from prompts to embeddings (Eq. 10, 11)

    def forward(self, features, rationale=True, task=None):
        """Adds `sentence_embedding` `[N, D]`, of unit length, and `rationale_ids` `[N, T]`, filled up with an end token.

        task: "document", as `encode_document` has it, reads the prompt alone where the checkpoint was trained so.
        """
        rationale = rationale and not (task == "document" and self.reading.get("documents") == "prompt")
        ids, mask, counted = (features[name] for name in ("input_ids", "attention_mask", "counted"))
        cache = {self.cache_name: DynamicCache(config=self.model.config)}  # grows with every call
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # padding does not shift them

        def read(ids):
            out = self.model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **cache)
            return out.last_hidden_state

        hidden = read(ids)  # [N, P, D]
        prompt = torch.where(counted[..., None].bool(), hidden.float(), 0).sum(1)
        written_about = torch.zeros_like(prompt)
        writing, written = torch.ones_like(ids[:, 0], dtype=torch.bool), [ids[:, :0]]
        for _ in range(self.reading["max_new_tokens"] if rationale else 0):
            token = self.model.get_output_embeddings()(hidden[:, -1]).argmax(-1)  # greedy, so scaled logits give the same
            written.append(token.where(writing, self.end_ids[0])[:, None])
            mask, positions = F.pad(mask, (0, 1), value=1), positions[:, -1:] + 1
            hidden = read(token[:, None])  # the end token is read, too: Eq. 11 counts it
            written_about = written_about + torch.where(writing[:, None], hidden[:, 0].float(), 0)
            writing = writing & ~torch.isin(token, self.end_ids)
            if not writing.any():
                break
        if self.reading.get("pooling") == "halves":  # one vote each, however many tokens either has
            prompt, written_about = F.normalize(prompt, dim=-1), F.normalize(written_about, dim=-1)
        embedding = F.normalize(prompt + written_about, dim=-1)
        return {**features, "rationale_ids": torch.cat(written, 1), "sentence_embedding": embedding}

    # ------------------------------------------------------------ what sentence-transformers calls

    def get_embedding_dimension(self):
        return self.model.config.get_text_config().hidden_size

    def save(self, output_path, **_):
        self.model.save_pretrained(output_path)
        self.tokenizer.save_pretrained(output_path)
        with open(os.path.join(output_path, SETTINGS), "w", encoding="utf-8") as file:
            json.dump(self.reading, file, indent=2)
        shutil.copyfile(__file__, os.path.join(output_path, f"{COPY}.py"))

    @classmethod
    def load(cls, folder, model_kwargs=None, cache_folder=None, token=None, revision=None, local_files_only=False, **_):
        hub = dict(cache_dir=cache_folder, token=token, revision=revision, local_files_only=local_files_only)
        return cls(folder, model_kwargs, **hub)

    def __reduce__(self):  # for the processes of encode(device=[…]): they know this file by its own name
        return _empty, (), self.__dict__


def _empty():
    return GraceModule.__new__(GraceModule)
