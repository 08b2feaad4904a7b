"""The policy pi_theta: one causal language model, its hidden states and its output head (Eq. 10).

Any decoder-only Hugging Face chat model will do. What this file guarantees:

* Weights are float32; bfloat16 is a compute type (speed/bfloat16.py).
* A model whose logits are more than its output head applied to its last hidden state is used only
  if this file knows how they are made (soft-capping, scaling), and refused otherwise.
* The model stays in eval mode, even in the update: with dropout, the first probability ratio of the
  clipped objective would be noise around 1 instead of exactly 1.

Shapes: N prompts, P prompt positions, L positions, D hidden size, V vocabulary.
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
import json
import os

import torch
import transformers

from plumbing.errors import GraceError
from plumbing.models import check_network, end_ids, opening, room_for_prompts
from prompt import PromptTemplate, Reading
from speed import bfloat16, lora
from speed.decode import PlainDecoder, SharedDecoder, can_share_prompts

transformers.utils.logging.disable_progress_bar()  # of files that are read and written: they would be printed over ours
SETTINGS = "grace_config.json"
SAFE = dict(trust_remote_code=False)  # left out, the library would ask at the terminal


class Policy:
    """A causal language model and how it reads a text.

    template     P(x): `policy.template(texts)` gives `Prompts` (prompt.py)
    reading      instruction, limits and pooling
    model        the weights that are trained and saved
    network      what computes: the model, or its copy in bfloat16; `base` and `head` are its body and its output head
    end_ids      `[n]`, the tokens that end a rationale
    adapters     what is trained instead of the weights, once `adapt` has been called (speed/lora.py); else None
    captures     whether its decoding step can be captured as a CUDA graph, until one could not (speed/decode.py)
    """

    captures = True
    adapters, switched = None, contextlib.nullcontext  # switched: a context in which the adapters are as this policy has them

    def __init__(self, model, tokenizer, reading=None, dtype="float32"):
        if dtype not in ("float32", "bfloat16"):
            raise GraceError(f"dtype {dtype!r}: give float32 or bfloat16")
        self.model, self.tokenizer, self.reading = model.eval(), tokenizer, reading or Reading()
        self.device, self.dtype = model.device, "float32"  # until the model has been checked
        self.compute()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # streams, captured graphs and Triton's kernels go to the current device
        self.end_ids = torch.tensor(end_ids(model, tokenizer), device=self.device)
        about = model.config.get_text_config()
        limit = room_for_prompts(about, self.reading.max_prompt_tokens, self.reading.max_new_tokens)
        self.reading = dataclasses.replace(self.reading, max_prompt_tokens=limit)
        self.softcap = getattr(about, "final_logit_softcapping", None)  # Gemma
        # Cohere multiplies its logits, Granite divides them.
        self.logit_scale = (getattr(about, "logit_scale", None) or 1.0) / (getattr(about, "logits_scaling", None) or 1.0)
        # transformers called this argument past_key_values until 5.24.
        self.cache_name = "cache" if "cache" in inspect.signature(self.base.forward).parameters else "past_key_values"
        # What may be read once: the instruction for all prompts, a prompt for its K rationales.
        self.shares_instruction, self.shares_prompts = check_network(self), can_share_prompts(self)
        self.dtype = dtype  # checked in float32: rounding could hide an error of structure
        self.compute()
        self.template = PromptTemplate(tokenizer, self.reading, self.device, self.shares_instruction)

    @classmethod
    def load(cls, source, device="cpu", dtype=None, **reading):
        """Open a checkpoint folder or hub id. Keyword arguments that are not None override its reading.

        Weights are float32 whatever the file holds. dtype: what to compute in, "float32" or "bfloat16"; None: the faster one.
        Raises GraceError if there is no such model, or if it cannot be used (plumbing/models.py).
        """
        from transformers import AutoTokenizer
        from transformers.utils import cached_file

        settings = {}
        with opening(source):
            tokenizer, model = AutoTokenizer.from_pretrained(source, **SAFE), _model(source)
            if path := cached_file(source, SETTINGS, _raise_exceptions_for_missing_entries=False):
                with open(path) as file:
                    settings = dict(json.load(file))
            if unknown := settings.keys() - {f.name for f in dataclasses.fields(Reading)}:
                raise GraceError(f"{path}: unknown setting {', '.join(sorted(unknown))}")
            own = Reading(**settings)
        reading = dataclasses.replace(own, **{k: v for k, v in reading.items() if v is not None})
        model = model.to(device)
        return cls(model, tokenizer, reading, dtype or ("bfloat16" if bfloat16.pays(model) else "float32"))

    def save(self, folder, merged=False):
        """Write an ordinary checkpoint folder, with the reading beside the weights. Adapters alone, or merged into them."""
        if self.adapters and not merged:
            self.adapters.save_pretrained(folder, save_embedding_layers=False)
        else:
            (lora.merged(self.adapters) if self.adapters else self.model).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        with open(os.path.join(folder, SETTINGS), "w") as file:
            json.dump(dataclasses.asdict(self.reading), file, indent=2)

    def save_result(self, folder):
        """Write the whole model as an ordinary checkpoint folder, and adapters, where they are what was trained, beside it."""
        self.save(folder, merged=True)
        if self.adapters:
            self.save(os.path.join(folder, "adapter"))

    def adapt(self, rank, seed, folder=None):
        """From now on train adapters of this rank instead of the weights: new ones, or those of a folder (speed/lora.py)."""
        self.adapters = lora.adapt(self.model, rank, seed, folder)
        self.compute()

    def reads(self, **reading):
        """This policy with some of its reading changed; all weights are shared."""
        other = copy.copy(self)
        other.reading = dataclasses.replace(self.reading, **reading)
        other.template = PromptTemplate(self.tokenizer, other.reading, self.device, self.shares_instruction)
        return other

    def start(self):
        """This policy with its adapters off: as it was before training. All weights are shared."""
        other = copy.copy(self)
        other.switched = functools.partial(lora.off, self.network)
        return other

    def compute(self):
        """Make what computes anew: the model itself, or its copy in bfloat16."""
        self.network = bfloat16.rounded(self.model) if self.dtype == "bfloat16" else self.model
        self.base, self.head = self.network.base_model, self.network.get_output_embeddings()

    def follow(self):
        """To be called when the weights have moved: what computes follows them."""
        if self.network is not self.model:
            bfloat16.round_again(self.network, self.model)

    def freeze(self):
        """For a policy that only reads: let go of the float32 weights, where something else computes. Returns the policy."""
        self.model = self.network.requires_grad_(False)
        return self

    # ------------------------------------------------------------ the network

    def forward(self, ids, mask, positions, cache=None, **more):
        """One pass of the body: hidden states for the head, those to pool (both `[N, L, D]`), the cache.

        Positions are explicit: left padding must not shift them, and a decoding step with a cache
        would otherwise get them wrong. Further arguments reach the attention function (decode.py).
        """
        below = self.reading.pooling == "penultimate"
        with self.switched():
            out = self.base(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                output_hidden_states=below,
                **{self.cache_name: cache},
                **more,
            )
        last = out.last_hidden_state
        return last, out.hidden_states[-2] if below else last, getattr(out, self.cache_name)

    def prefill(self, ids, mask, n_shared):
        """Read prompts, their first `n_shared` positions only once for all of them.

        `[N, P], [N, P]` to what `forward` returns, over the positions from S = `n_shared` on: `[N, P - S, D]`.
        Exact, gradients included: keys and values of a token depend on nothing that comes after it.
        """
        positions, cache, S = (mask.cumsum(1) - 1).clamp(min=0), None, n_shared
        if S:
            _, _, cache = self.forward(ids[:1, :S], mask[:1, :S], positions[:1, :S])
            cache.batch_repeat_interleave(len(ids))
        return self.forward(ids[:, S:], mask, positions[:, S:], cache)

    def decoder(self, cache, mask, K):
        """The decoder for K rationales of each prompt, given the prompts' cache and mask `[N, P]`."""
        return (SharedDecoder if self.shares_prompts else PlainDecoder)(self, cache, mask, K)

    def logits(self, hidden):
        """The output head as the model's own forward applies it. `[..., D] -> [..., V]`, float32 or more."""
        logits = self.head(hidden)
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def load_policies(config, checkpoint=None):
    """The policy to train, from a checkpoint if there is one, and the starting policy for the KL term, or None.

    With adapters (`--lora`) both are one model: that of `--model`, with its adapters on and off.
    """
    load = lambda source: Policy.load(source, config.device, config.dtype, **config.reading)
    if config.lora:
        policy = load(config.model)
        policy.adapt(config.lora, config.seed, checkpoint)
        trained, every = policy.adapters.get_nb_trainable_parameters()
        print(f"adapters of rank {config.lora}: {trained / 1e6:.2f} M of {every / 1e6:.2f} M parameters are trained")
        return policy, policy.start() if config.kl else None
    return load(checkpoint or config.model), load(config.model).freeze() if config.kl else None


def _model(source):
    """The network of a checkpoint folder or hub id, float32. Adapters are merged into the base that they name."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import find_adapter_config_file

    if adapter := find_adapter_config_file(source):
        with open(adapter) as file:
            base = json.load(file)["base_model_name_or_path"]
        with opening(base):
            model = _model(base)
        model = lora.load(model, source).merge_and_unload().requires_grad_(True)
        model.name_or_path = source  # adapters trained from here on name this as their base
        return model
    options = dict(dtype=torch.float32, use_safetensors=True, output_loading_info=True, **SAFE)
    model, found = AutoModelForCausalLM.from_pretrained(source, **options)
    if missing := sorted(found["missing_keys"]):  # they would be random
        raise GraceError(f"{source}: has no weights for {', '.join(missing[:3])}: give a whole causal language model")
    return model
