"""The prompt P(x): an instruction, a text, and the place where the rationale begins (Eq. 9).

What this file guarantees:

* The instruction is left out of the embedding *exactly*, to the token.
* A text over the limit loses its own end, never the template's, and the texts that were cut are counted.
* A text is data: whatever its characters spell, they never become control tokens.
* Ids are built once and never decoded again.

Shapes: N prompts, P prompt positions.
"""

import os
from dataclasses import dataclass

import torch

from plumbing.errors import GraceError, first_line
from pool import POOLS

INSTRUCTION = (
    "You will be given a text. Work out what it means: who and what it is about, what is said or asked, "
    "and what it implies. Write your reasoning between <think> and </think>, then state in a few plain "
    "sentences what the text is about as a whole, in words that would fit any text of the same meaning."
)

DOCUMENTS = "rationale", "prompt"


@dataclass
class Reading:
    """How a checkpoint reads a text. Saved beside its weights, because another reading gives another embedding."""

    instruction: str = INSTRUCTION
    max_prompt_tokens: int = 1024
    max_new_tokens: int = 256
    pooling: str = "mean"
    documents: str = "rationale"  # what a positive or negative is embedded with; "prompt": queries think, documents are read
    twice: bool = False  # a prompt holds its text two times, and the second reading counts

    def __post_init__(self):
        if self.documents not in DOCUMENTS:
            raise GraceError(f"unknown documents {self.documents!r}: choose one of {', '.join(DOCUMENTS)}")
        if self.pooling not in POOLS:
            raise GraceError(f"unknown pooling {self.pooling!r}: choose one of {', '.join(POOLS)}")
        if self.max_new_tokens < 1 or self.max_prompt_tokens < 1:
            raise GraceError("max_prompt_tokens and max_new_tokens must be at least 1")


@dataclass
class Prompts:
    """N prompts. The instruction's tokens come first, the same in every row; padding follows them.

        position   instruction | pad pad | text text text | template
        mask            1         0   0     1    1    1        1
        counted         0         0   0     1    1    1        1       what Eq. 11 counts
        text            0         0   0     1    1    1        0       what is modelled: of two readings the first

    So the instruction, often the longest part, is read once for all rows, and every prompt ends at -1.
    With `n_shared` = 0 (models with sliding windows, which count positions) this is plain left padding.
    """

    ids: torch.Tensor  # [N, P]
    mask: torch.Tensor  # [N, P]
    counted: torch.Tensor  # [N, P]
    text: torch.Tensor  # [N, P]
    cut: torch.Tensor  # [N] bool, the text was over the limit and lost its end
    n_shared: int = 0  # how many first positions are the same in every row

    def __getitem__(self, rows):
        return Prompts(self.ids[rows], self.mask[rows], self.counted[rows], self.text[rows], self.cut[rows], self.n_shared)


class PromptTemplate:
    """P: turns texts into `Prompts`, with a tokenizer's chat template and a reading's instruction and limit.

    A prompt is `prefix + text + suffix`, as the chat template writes it; the instruction is in the prefix.
    shares_instruction: whether padding may stand between the instruction and the text, so that the instruction is read once.
    Raises GraceError if the template does not write the instruction first and then the text, or if the tokenizer cannot
    say which characters a token covers.
    """

    def __init__(self, tokenizer, reading, device, shares_instruction):
        self.tokenizer, self.reading, self.device, self.shares_instruction = tokenizer, reading, device, shares_instruction
        if not getattr(tokenizer, "is_fast", False):
            raise GraceError(f"{type(tokenizer).__name__} does not say which characters a token covers: use a fast tokenizer")
        self.prefix, self.suffix = self._around()
        # Ids that a template may write and a text may not: a text is data, whatever its characters spell.
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.control = (special | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}

    def _around(self):
        """What the template writes before and after any text: what the renderings of two texts have in common."""
        for as_system in (True, False):  # without a system role, the instruction opens the user's message
            one, two, spaced = (self._chat(text, as_system) for text in ("x", "y", " x "))
            prefix = os.path.commonprefix([one or "", two or ""])
            suffix = os.path.commonprefix([(one or "")[::-1], (two or "")[::-1]])[::-1]
            if self.reading.instruction.strip() in prefix and one == prefix + "x" + suffix:
                shown = spaced[len(prefix) : len(spaced) - len(suffix)]  # some templates strip what they are given
                self.strips = shown.startswith("x"), shown.endswith("x")
                return prefix, suffix
        raise GraceError(
            "the chat template does not write instruction, then text: the system prefix that "
            "Eq. 11 leaves out cannot be located. Use another template (tokenizer.chat_template)."
        )

    def _chat(self, text, as_system):
        """The chat template's rendering of instruction and text (Eq. 9); None if it refuses a system message.

        Without a chat template: instruction, blank line, "Text:" and the text, blank line, "Rationale:".
        """
        instruction, tokenizer = self.reading.instruction, self.tokenizer
        if tokenizer.chat_template is None:
            return f"{tokenizer.bos_token or ''}{instruction}\n\nText: {text}\n\nRationale:"
        chat = [{"role": "user", "content": text if as_system else f"{instruction}\n\n{text}"}]
        chat = [{"role": "system", "content": instruction}, *chat] if as_system else chat
        # With a fixed date, templates that print today's date (Llama 3) do not change the embedding overnight.
        options = dict(tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024")
        try:
            return tokenizer.apply_chat_template(chat, **options)
        except Exception as error:  # jinja2.TemplateError, of a template that is broken or refuses the role
            if as_system and type(error).__module__.split(".")[0] == "jinja2":
                return None
            raise GraceError(f"the chat template cannot be used ({first_line(error)})") from error

    def render(self, text):
        """The prompt as a string, stripped as the template strips it; a blank text leaves the prefix as it is."""
        text = f"{text.strip()}\n\n{text.strip()}" if self.reading.twice else text
        text = text.lstrip() if self.strips[0] else text
        return self.prefix + (text.rstrip() if self.strips[1] else text) + self.suffix

    def readings(self, text):
        """`[(start, end)]`: the characters of `render(text)` that are the text, as often as it is read."""
        start, end = len(self.prefix), len(self.render(text)) - len(self.suffix)
        once = max(0, (end - start) // 2 - 1)  # a blank line stands between two readings
        return [(start, start + once), (end - once, end)] if self.reading.twice else [(start, end)]

    def encode(self, texts):
        """Each prompt's ids, and the characters of `render(text)` that each of them covers: `[(ids, [(start, end)])]`.

        No character of a text becomes a control token. Raises GraceError for a text that is not Unicode.
        """
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise GraceError(
                    f"a text holds half a character (a lone surrogate), so it is not Unicode: {text!r:.60}"
                ) from error
        strings = [self.render(text) for text in texts]
        encoded = self.tokenizer(strings, add_special_tokens=False, return_offsets_mapping=True)
        rows = []
        for string, ids, offsets in zip(strings, encoded["input_ids"], encoded["offset_mapping"]):
            first, last = len(self.prefix), len(string) - len(self.suffix)
            if any(i in self.control and end > first and start < last for i, (start, end) in zip(ids, offsets)):
                ids, offsets = self._encode_as_data(string[first:last])
            rows.append((ids, offsets))
        return rows

    def _encode_as_data(self, text):
        """`encode` for a text that spells control tokens: prefix, text and suffix one by one, the text without them."""
        ids, offsets, start = [], [], 0
        for piece, is_text in ((self.prefix, False), (text, True), (self.suffix, False)):
            options = dict(add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=is_text)
            encoded = self.tokenizer(piece, **options)
            for i, (a, b) in zip(encoded["input_ids"], encoded["offset_mapping"]):
                if is_text and i in self.control:  # a word-level tokenizer has them as words
                    i = self.tokenizer.unk_token_id
                if i is not None:
                    ids.append(i)
                    offsets.append((start + a, start + b))
            start += len(piece)
        return ids, offsets

    def __call__(self, texts, share=True):
        """P(x) of each text. If a prompt is over the limit, the end of its text is cut.

        share=False: plain left padding, the instruction in every row. Raises GraceError if the template
        alone is longer than the limit.
        With `Reading.twice` the text, a blank line and the text again stand in the prompt, and only the second reading counts:
        each of its tokens has the whole text before it (Echo embeddings, Springer et al. 2024). Over the limit, both are cut.
        """
        rows, marks, cut = [], [], []
        for text, (ids, offsets) in zip(texts, self.encode(texts)):
            # The tokenizer says which characters each token covers, so what counts is exact: a token
            # that straddles a boundary holds some of the text, and counts as text.
            readings = self.readings(text)
            before = [sum(stop <= start for _, stop in offsets) for start, _ in readings]
            inside = [sum(stop <= end for _, stop in offsets) for _, end in readings]  # up to the last token that is text alone
            n_read = sum(first < readings[0][1] for first, _ in offsets)
            row, lost = self._shorten(ids, list(zip(before, inside)))
            rows.append(row)
            marks.append((len(row), before[0], n_read - lost, before[-1] - lost * (len(readings) - 1)))
            cut.append(lost > 0)
        instructions = [row[: mark[1]] for row, mark in zip(rows, marks)]
        shared = os.path.commonprefix(instructions) if share and self.shares_instruction else []
        S, P = len(shared), max(map(len, rows))
        ids = torch.tensor([shared + [0] * (P - len(row)) + row[S:] for row in rows])  # [N, P]
        lengths, instruction, read, uncounted = torch.tensor(marks).T[..., None]  # [N, 1] each, in tokens
        to_end = torch.arange(P, 0, -1)  # every prompt ends at -1, so masks come from the distance to the end
        mask = to_end <= lengths - S
        mask[:, :S] = True
        counted = to_end <= lengths - uncounted
        text = (to_end <= lengths - instruction) & (to_end > lengths - read)
        tensors = ids, mask.long(), counted.long(), text.long(), torch.tensor(cut)
        return Prompts(*(x.to(self.device) for x in tensors), S)

    def _shorten(self, ids, readings):
        """A prompt's ids within the limit, and how many tokens each reading of the text has lost at its end for that.

        readings: `[(first, stop)]` of their tokens; what stands around them stays.
        """
        excess, n_text = len(ids) - self.reading.max_prompt_tokens, sum(stop - first for first, stop in readings)
        lost = max(0, -(-excess // len(readings)))
        if excess > 0 and any(stop - first <= lost for first, stop in readings):
            raise GraceError(
                f"instruction and template take {len(ids) - n_text} tokens; "
                f"max_prompt_tokens = {self.reading.max_prompt_tokens} leaves no room for a text"
            )
        for _, stop in reversed(readings if lost else []):
            ids = ids[: stop - lost] + ids[stop:]
        return ids, lost
