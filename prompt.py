"""The prompt P(x): an instruction, a text, and the place where the rationale begins (Eq. 9).

What this file guarantees:

* The instruction is left out of the embedding *exactly*, to the token.
* A text over the limit loses its own end, never the template's, and the texts that were cut are counted.
* Ids are built once and never decoded again.

Shapes: N prompts, P prompt positions.
"""

import os
from dataclasses import dataclass

import torch

from plumbing.errors import GraceError
from pool import POOLS

INSTRUCTION = (
    "You will be given a text. Work out what it means: who and what it is about, what is said or asked, "
    "and what it implies. Write your reasoning between <think> and </think>, then state in a few plain "
    "sentences what the text is about as a whole, in words that would fit any text of the same meaning."
)


@dataclass
class Reading:
    """How a checkpoint reads a text. Saved beside its weights, because another reading gives another embedding."""

    instruction: str = INSTRUCTION
    max_prompt_tokens: int = 1024
    max_new_tokens: int = 256
    pooling: str = "mean"

    def __post_init__(self):
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
        text            0         0   0     1    1    1        0

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

    shares_instruction: whether padding may stand between the instruction and the text, so that the instruction is read once.
    Raises GraceError if the template does not write the instruction first and then the text, or if the tokenizer cannot
    say which characters a token covers.
    """

    def __init__(self, tokenizer, reading, device, shares_instruction):
        self.tokenizer, self.reading, self.device, self.shares_instruction = tokenizer, reading, device, shares_instruction
        # What two renderings have in common is what comes before and after any text.
        one, two = self.render("x"), self.render("y")
        self.prefix = os.path.commonprefix([one, two])
        self.suffix = os.path.commonprefix([one[::-1], two[::-1]])[::-1]
        if reading.instruction.strip() not in self.prefix or one != self.prefix + "x" + self.suffix:
            raise GraceError(
                "the chat template does not write instruction, then text: the system prefix that "
                "Eq. 11 leaves out cannot be located. Use another template (tokenizer.chat_template)."
            )
        if not getattr(tokenizer, "is_fast", False):
            raise GraceError(f"{type(tokenizer).__name__} does not say which characters a token covers: use a fast tokenizer")

    def render(self, text):
        """The prompt as a string: instruction as the system message, text as the user's (Eq. 9).

        If the template has no system role, the instruction opens the user's message. If there is
        no chat template at all: instruction, blank line, "Text:" and the text, blank line, "Rationale:".
        """
        instruction, tokenizer = self.reading.instruction, self.tokenizer
        if tokenizer.chat_template is None:
            return f"{tokenizer.bos_token or ''}{instruction}\n\nText: {text}\n\nRationale:"
        # With a fixed date, templates that print today's date (Llama 3) do not change the embedding overnight.
        options = dict(tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024")
        system, user = {"role": "system", "content": instruction}, {"role": "user", "content": text}
        try:
            return tokenizer.apply_chat_template([system, user], **options)
        except Exception as error:  # jinja2.TemplateError, raised by the template itself
            if type(error).__module__.split(".")[0] != "jinja2":
                raise
            user["content"] = f"{instruction}\n\n{text}"
            return tokenizer.apply_chat_template([user], **options)

    def __call__(self, texts, share=True):
        """P(x) of each text. If a prompt is over the limit, the end of its text is cut.

        share=False: plain left padding, the instruction in every row. Raises GraceError if the template
        alone is longer than the limit, or if the template rewrites a text.
        """
        strings = [self.render(text) for text in texts]
        for text, string in zip(texts, strings):
            if not (string.startswith(self.prefix) and string.endswith(self.suffix)):
                raise GraceError(f"the chat template rewrites this text, so where it starts is unknown: {text[:60]!r}")
        encoded = self.tokenizer(strings, add_special_tokens=False, return_offsets_mapping=True)
        rows, before, after, cut = [], [], [], []
        for string, ids, offsets in zip(strings, encoded["input_ids"], encoded["offset_mapping"]):
            # The tokenizer says which characters each token covers, so what counts is exact: a token
            # that straddles a boundary holds some of the text, and counts as text.
            n_before = sum(end <= len(self.prefix) for _, end in offsets)
            n_after = sum(start >= len(string) - len(self.suffix) for start, _ in offsets)
            row = self._shorten(ids, n_before, n_after)
            rows.append(row)
            before.append(n_before)
            after.append(n_after)
            cut.append(len(row) < len(ids))
        shared = os.path.commonprefix([row[:n] for row, n in zip(rows, before)]) if share and self.shares_instruction else []
        S, P = len(shared), max(map(len, rows))
        ids = torch.tensor([shared + [0] * (P - len(row)) + row[S:] for row in rows])  # [N, P]
        lengths, before, after = (torch.tensor(x)[:, None] for x in ([len(row) for row in rows], before, after))
        to_end = torch.arange(P, 0, -1)  # every prompt ends at -1, so masks come from the distance to the end
        mask = to_end <= lengths - S
        mask[:, :S] = True
        counted = to_end <= lengths - before
        text = counted & (to_end > after)
        tensors = ids, mask.long(), counted.long(), text.long(), torch.tensor(cut)
        return Prompts(*(x.to(self.device) for x in tensors), S)

    def _shorten(self, ids, n_before, n_after):
        """A prompt's ids within the limit: the text loses its end, the template after it stays."""
        limit = self.reading.max_prompt_tokens
        if len(ids) <= limit:
            return ids
        if n_before + n_after >= limit:
            raise GraceError(
                f"the template and instruction alone take {n_before + n_after} tokens; "
                f"max_prompt_tokens = {limit} leaves no room for a text"
            )
        return ids[: limit - n_after] + ids[len(ids) - n_after :]
