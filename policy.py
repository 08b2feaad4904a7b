"""The policy pi_theta and the prompt P(x) it answers (Eq. 9, 10): one causal language model, and how it reads.

Any decoder-only Hugging Face chat model will do. What this file makes sure of:

* The instruction is left out of the embedding *exactly*: where it ends is known to the token.
* A text over the limit loses its own end, never the template's; how many were cut is counted.
* Weights are float32; bfloat16 is a compute type. (At a learning rate of 1e-6 a step is smaller than
  the spacing of bfloat16 numbers, and most bfloat16 weights would never move.)
* A model whose logits are more than its output head over its last hidden state is used only where
  this file knows how (soft-capping, scaling), and refused otherwise.
* The model stays in eval mode, in the update too: with dropout, the first probability ratio of the
  clipped objective would be noise around 1 instead of 1.

Shapes: N prompts, P prompt positions, L positions, D hidden size, V vocabulary.
"""

import bisect
import contextlib
import copy
import dataclasses
import json
import os
import warnings
from dataclasses import dataclass

import torch

from data import GraceError, first_line
from decode import PlainDecoder, SharedDecoder
from pool import POOLS, length_mask

INSTRUCTION = (
    "You will be given a text. Work out what it means: who and what it is about, what is said or asked, "
    "and what it implies. Write your reasoning between <think> and </think>, then state in a few plain "
    "sentences what the text is about as a whole, in words that would fit any text of the same meaning."
)
SETTINGS = "grace_config.json"


@dataclass
class Reading:
    """How a checkpoint reads a text. Saved beside its weights: another reading, another embedding."""

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
    """N prompts. The instruction's tokens come first, the same in every row; padding stands behind them.

        position   instruction | pad pad | text text text | template
        mask            1         0   0     1    1    1        1
        counted         0         0   0     1    1    1        1       what Eq. 11 counts
        text            0         0   0     1    1    1        0

    So the instruction, often the longest part, is read once for all rows, and every prompt ends at -1.
    With `shared` = 0 (models with sliding windows, which count positions) this is plain left padding.
    """

    ids: torch.Tensor  # [N, P]
    mask: torch.Tensor  # [N, P]
    counted: torch.Tensor  # [N, P]
    text: torch.Tensor  # [N, P]
    cut_rows: torch.Tensor  # [N] bool, the text was over the limit and lost its end
    shared: int = 0  # how many first positions are the same in every row

    @property
    def cut(self):
        """How many texts lost their end."""
        return int(self.cut_rows.sum())

    def __getitem__(self, rows):
        return Prompts(self.ids[rows], self.mask[rows], self.counted[rows], self.text[rows], self.cut_rows[rows], self.shared)


class Policy:
    """A causal language model and how it reads: pi_theta, P(x), the end tokens, the output head."""

    def __init__(self, model, tokenizer, reading=None, dtype="float32"):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.reading = _fitted(reading or Reading(), model.config.get_text_config())
        self.base, self.head = model.base_model, model.get_output_embeddings()
        self.device, self.dtype = model.device, dtype
        self.end_ids = torch.tensor(_end_ids(model, tokenizer), device=self.device)
        text_config = model.config.get_text_config()
        self.softcap = getattr(text_config, "final_logit_softcapping", None)  # Gemma
        self.logit_scale = getattr(text_config, "logit_scale", None) or 1.0  # Cohere
        self.logit_scale /= getattr(text_config, "logits_scaling", None) or 1.0  # Granite
        # A sliding window counts positions, so padding must not stand between the instruction and the text.
        layers = getattr(text_config, "layer_types", None) or [
            "sliding" if getattr(text_config, "sliding_window", None) else "full"
        ]
        self.can_share = not any("sliding" in layer or "chunked" in layer for layer in layers)
        self.keeps_once = model.config._attn_implementation in ("sdpa", "grace")  # grace: in another Policy already
        if self.keeps_once:
            model.set_attn_implementation("grace")
        self._check()
        self.prefix, self.suffix = self._template()

    @classmethod
    def load(cls, source, device="cpu", dtype="float32", **reading):
        """Open a checkpoint folder or hub id. Keyword arguments that are not None override its reading.

        Weights are float32 whatever the file holds; `dtype="bfloat16"` computes in bfloat16, on CUDA.
        Raises GraceError if there is no such model, or if it cannot be used (see `_check`).
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        settings, path = {}, os.path.join(source, SETTINGS)
        try:
            safe = dict(trust_remote_code=False)  # left out, the library would ask at the terminal
            tokenizer = AutoTokenizer.from_pretrained(source, **safe)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True, **safe)
            if os.path.isfile(path):
                with open(path) as file:
                    settings = dict(json.load(file))
        except Exception as error:  # each kind of damage raises its own; to a user they mean the same
            advice = "Give a folder written by save_pretrained, or, with a network, a hub id."
            if "trust_remote_code" in str(error):
                advice = "Code that comes with a model is not run here: give a model that transformers knows by itself."
            elif "no file named model.safetensors" in str(error):
                advice = (
                    "Other formats are pickles, which can run code, and are not read. If you trust this one, convert it once: "
                    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
                )
            raise GraceError(
                f"{source}: cannot be loaded as a causal language model ({first_line(error)}). {advice}"
            ) from error
        if unknown := settings.keys() - {f.name for f in dataclasses.fields(Reading)}:
            raise GraceError(f"{path}: unknown setting {', '.join(sorted(unknown))}")
        settings |= {k: v for k, v in reading.items() if v is not None}
        return cls(model.to(device), tokenizer, Reading(**settings), dtype)

    def save(self, folder):
        """Write an ordinary checkpoint folder, with the reading beside the weights."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        with open(os.path.join(folder, SETTINGS), "w") as file:
            json.dump(dataclasses.asdict(self.reading), file, indent=2)

    def twin(self):
        """A copy with bfloat16 weights, to sample from: each token reads half the bytes. The float32 weights stay."""
        twin = copy.copy(self)
        twin.model, twin.dtype = copy.deepcopy(self.model).requires_grad_(False), "as the weights"
        for parameter in twin.model.parameters():  # not the buffers: positions need float32
            parameter.data = parameter.data.to(torch.bfloat16)
        twin.base, twin.head = twin.model.base_model, twin.model.get_output_embeddings()
        return twin

    def follow(self, policy):
        """Take over another policy's weights, rounded to this one's type."""
        with torch.no_grad():
            torch._foreach_copy_(list(self.model.parameters()), list(policy.model.parameters()))

    # ------------------------------------------------------------ P(x)

    def render(self, text):
        """The prompt as a string: instruction as the system message, text as the user's (Eq. 9).

        Where the template knows no system role the instruction opens the user's message. Where
        there is no chat template at all: instruction, blank line, text, blank line, "Rationale:".
        """
        instruction, tok = self.reading.instruction, self.tokenizer
        if tok.chat_template is None:
            return f"{tok.bos_token or ''}{instruction}\n\nText: {text}\n\nRationale:"
        # A fixed date keeps templates that print today's (Llama 3) from changing the embedding overnight.
        options = dict(tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024")
        system, user = ({"role": r, "content": c} for r, c in (("system", instruction), ("user", text)))
        try:
            return tok.apply_chat_template([system, user], **options)
        except Exception as error:  # jinja2.TemplateError, raised by the template itself
            if type(error).__module__.split(".")[0] != "jinja2":
                raise
            user = {"role": "user", "content": f"{instruction}\n\n{text}"}
            return tok.apply_chat_template([user], **options)

    def _template(self):
        """The strings that stand before and after any text: what two renderings have in common."""
        one, two = self.render("x"), self.render("y")
        prefix = os.path.commonprefix([one, two])
        suffix = os.path.commonprefix([one[::-1], two[::-1]])[::-1]
        if self.reading.instruction.strip() not in prefix or one != prefix + "x" + suffix:
            raise GraceError(
                "the chat template does not write instruction, then text: the system prefix that "
                "Eq. 11 leaves out cannot be located. Use another template (tokenizer.chat_template)."
            )
        return prefix, suffix

    def prompts(self, texts, share=True):
        """P(x) of each text, as ids. The text's end is cut where a prompt is over the limit.

        The text starts at a known character, and the tokenizer says which characters each token
        covers, so what counts is exact. A token that straddles the boundary holds some of the text
        and counts. Raises GraceError if the template alone is longer than the limit.
        """
        limit, rows = self.reading.max_prompt_tokens, []
        strings = [self.render(text) for text in texts]
        encoded = self.tokenizer(strings, add_special_tokens=False, return_offsets_mapping=True)
        for text, string, ids, offsets in zip(texts, strings, encoded["input_ids"], encoded["offset_mapping"]):
            if not (string.startswith(self.prefix) and string.endswith(self.suffix)):
                raise GraceError(f"the chat template rewrites this text, so where it starts is unknown: {text[:60]!r}")
            before = bisect.bisect_right(offsets, len(self.prefix), key=lambda span: span[1])
            after = len(offsets) - bisect.bisect_left(offsets, len(string) - len(self.suffix), key=lambda span: span[0])
            if len(ids) > limit:
                if before + after >= limit:
                    raise GraceError(
                        f"the template and instruction alone take {before + after} tokens; "
                        f"max_prompt_tokens = {limit} leaves no room for a text"
                    )
                ids = ids[: limit - after] + ids[len(ids) - after :]
            rows.append((ids, before, after, len(ids) < len(offsets)))
        same = os.path.commonprefix([ids[:before] for ids, before, *_ in rows]) if share and self.can_share else []
        lengths, before, after, cut = (torch.tensor(x) for x in zip(*((len(ids), *more) for ids, *more in rows)))
        P, S = int(lengths.max()), len(same)
        padded = torch.tensor([same + [0] * (P - len(ids)) + ids[S:] for ids, *_ in rows])
        mask, counted, tail = (length_mask(n, P).flip(1).long() for n in (lengths - S, lengths - before, after))
        mask[:, :S] = 1
        return Prompts(*(x.to(self.device) for x in (padded, mask, counted, counted - tail, cut)), S)

    # ------------------------------------------------------------ the network

    def autocast(self):
        """bfloat16 as a compute type where it was asked for; the weights stay float32."""
        if self.dtype == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=torch.is_grad_enabled())
        return contextlib.nullcontext()

    def forward(self, ids, mask, positions, cache=None, **more):
        """One pass of the body: hidden states for the head, those to pool (both `[N, L, D]`), the cache.

        Positions are explicit: left padding must not shift them, and a decoding step with a cache
        would otherwise get them wrong. Further arguments reach the attention function (decode.py).
        """
        below = self.reading.pooling == "penultimate"
        with self.autocast():
            out = self.base(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=below,
                **more,
            )
        last = out.last_hidden_state
        return last, out.hidden_states[-2] if below else last, out.past_key_values

    def prefill(self, ids, mask, shared):
        """Read prompts, and their first `shared` positions only once for all of them.

        `[N, P], [N, P]` to what `forward` returns, over the positions from `shared` on: `[N, P - shared, D]`.
        Exact, gradients included: keys and values of a token depend on nothing that comes after it.
        """
        positions, cache = (mask.cumsum(1) - 1).clamp(min=0), None
        if shared:
            _, _, cache = self.forward(ids[:1, :shared], mask[:1, :shared], positions[:1, :shared])
            cache.batch_repeat_interleave(len(ids))
        return self.forward(ids[:, shared:], mask, positions[:, shared:], cache)

    def decoder(self, cache, mask, K):
        """What feeds K rationales of each prompt, given the prompts' cache and mask `[N, P]`."""
        return (SharedDecoder if self.keeps_once else PlainDecoder)(self, cache, mask, K)

    def logits(self, hidden):
        """The output head as the model's own forward applies it. `[..., D] -> [..., V]`, float32 or more."""
        with self.autocast():
            logits = self.head(hidden)
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def _check(self):
        """Refuse a model that this file would misread, and find out whether instructions can be shared.

        Its logits must be `self.logits`, its cache must be one that can be repeated K times, and padding on
        the left must not matter. Padding behind the first token must not either if that is to be shared: models
        with sliding windows, or with positions counted in the mask, mind.
        """
        name = type(self.model).__name__
        if self.base is self.model or self.head is None:
            raise GraceError(f"{name}: its body and output head cannot be told apart; not supported")
        a, b, c = (torch.arange(3, device=self.device) % self.head.weight.shape[0]).tolist()

        def read(ids, mask):
            ids, mask = (torch.tensor([x], device=self.device) for x in (ids, mask))
            hidden, _, cache = self.prefill(ids, mask, 0)
            return ids, hidden, cache

        def near(x, y):
            return torch.allclose(x.float(), y.float(), rtol=1e-2, atol=1e-2 * float(y.abs().max()))

        with torch.no_grad():
            ids, hidden, cache = read([a, b, c], [1, 1, 1])
            with self.autocast():
                own = self.model(input_ids=ids).logits
            if not near(self.logits(hidden), own):
                raise GraceError(f"{name}: its logits are not its output head over its last hidden state; not supported")
            plain, left, middle = (
                read(*x)[1][:, -1] for x in (([b, c], [1, 1]), ([a, b, c], [0, 1, 1]), ([b, a, c], [1, 0, 1]))
            )
        if not hasattr(cache, "layers") or not all(hasattr(layer, "batch_repeat_interleave") for layer in cache.layers):
            raise GraceError(f"{name}: its cache cannot be repeated for K rollouts; use an attention-only model")
        if not near(left, plain):
            raise GraceError(f"{name}: padding on the left changes what it computes; not supported")
        self.can_share &= near(middle, plain)
        self.keeps_once = self.keeps_once and self._comes_apart([a, b], c, near)
        if not self.keeps_once and self.model.config._attn_implementation == "grace":
            self.model.set_attn_implementation("sdpa")

    @torch.no_grad()
    def _comes_apart(self, prompt, token, near):
        """Whether a step over a prompt kept once gives what the library's cache gives."""
        ids, mask = torch.tensor([prompt], device=self.device), torch.ones(1, len(prompt), dtype=torch.long, device=self.device)
        token = torch.tensor([token] * 2, device=self.device)
        plain, _ = PlainDecoder(self, self.prefill(ids, mask, 0)[2], mask, 2).step(token)
        try:
            shared, _ = SharedDecoder(self, self.prefill(ids, mask, 0)[2], mask, 2, capture=False).step(token)
        except (AttributeError, TypeError, RuntimeError):
            # Its layers have no number, its body takes no further argument or does not hand it on (shapes clash then),
            # or its attention asks for more than `attend` does.
            return False
        return near(shared, plain)


def _fitted(reading, config):
    """The reading, with a prompt limit that leaves room for the rationale in the model's context; says so."""
    context = getattr(config, "max_position_embeddings", None) or float("inf")
    room = context - reading.max_new_tokens
    if room < 1:
        raise GraceError(f"max_new_tokens = {reading.max_new_tokens} fills the model's context of {context} tokens: lower it")
    if reading.max_prompt_tokens > room:
        warnings.warn(f"prompts are limited to {room} tokens: the model's context is {context}", stacklevel=3)
        reading = dataclasses.replace(reading, max_prompt_tokens=room)
    return reading


def _end_ids(model, tokenizer):
    """Every configured end token. Raises GraceError where there is none: no rationale could end."""
    found = set()
    for ids in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        found |= set(ids if isinstance(ids, (list, tuple)) else [ids])
    found -= {None}
    if not found:
        raise GraceError("no end token in the tokenizer, config or generation config: set tokenizer.eos_token")
    return sorted(found)
