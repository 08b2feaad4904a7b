"""Every setting of a run: one typed dataclass, two recipes, and the command line made from them.

A recipe only sets defaults. `paper` is the paper's equations as they stand; `full`, the default, repairs what
cannot teach there (grace.py lists the departures). Each choice is a setting of its own, so anything between the
two can be run as well.
"""

import argparse
import dataclasses
import math
from dataclasses import dataclass
from dataclasses import field as dataclass_field

from plumbing import ranks
from plumbing.errors import GraceError
from plumbing.models import pick_device
from pool import POOLS
from prompt import DOCUMENTS, Reading

RECIPES = {  # a recipe only sets defaults: any of them can be given on the command line
    "paper": dict(
        reward="paper", train_roles="positive", pathwise=0.0, length_normalize=True, kl=0.0, text_weight=0.0, tau=0.1,
        lambda_consistency=0.2, lambda_hard=0.2, temperature=1.0,
    ),
    "full": dict(
        reward="infonce", train_roles="query,positive", pathwise=0.3, length_normalize=False, kl=0.01, text_weight=1.0, tau=1.0,
        lambda_consistency=0.2, lambda_hard=0.2, temperature=0.7,
    ),
}  # fmt: skip
HOW_LONG_AND_WHERE = {  # settings that a resumed run may change: none affects its gradients
    "steps", "out", "resume", "overwrite", "save_every", "eval_every", "tokens_per_batch", "log_to",
}  # fmt: skip


def setting(default, help, choices=None, least=None, above=None):
    """A field of the configuration: its default, a line of help, and what it may be."""
    return dataclass_field(default=default, metadata=dict(help=help, choices=choices, least=least, above=above))


@dataclass
class Config:
    """Every setting of a run. Impossible combinations fail here, before anything is loaded."""

    model: str = setting(
        None, "checkpoint folder or hub id to start from; its grace_config.json, if any, sets what is marked (reading)"
    )
    data: str = setting(None, "training rows: jsonl, csv, parquet or txt file, folder, or hub id")
    out: str = setting(None, "folder for the checkpoint, metrics.jsonl, summary.json, rationales.md")
    mode: str = setting("supervised", "triplets, or plain texts", ("supervised", "unsupervised"))
    recipe: str = setting("full", "defaults for the settings marked (recipe)", tuple(RECIPES))
    # What is rewarded
    reward: str = setting(None, "(recipe) the reward: Eq. 13 and 15, or InfoNCE in place of both", ("paper", "infonce"))
    train_roles: str = setting(None, "(recipe) which of query,positive,negative get K rollouts and are trained")
    lambda_consistency: float = setting(None, "(recipe) weight of the consistency component, Eq. 16")
    lambda_hard: float = setting(None, "(recipe) weight of the hard component, Eq. 16")
    tau: float = setting(None, "(recipe) rewards are divided by this, Eq. 17", above=0)
    infonce_temperature: float = setting(0.05, "softmax temperature of the InfoNCE reward", above=0)
    gamma: float = setting(1.0, "penalty for a rollout without an end token, Eq. 28", least=0)
    # What is learned from it
    pathwise: float = setting(None, "(recipe) weight c of the pathwise term; 0: Eq. 19 alone", least=0)
    prompt_weight: float = setting(0.0, "weight of a pathwise term for the prompt's embedding without a rationale", least=0)
    kl: float = setting(None, "(recipe) weight of the KL term to the starting policy", least=0)
    kl_estimator: str = setting("k3", "estimator of the KL term; k2 has the gradient of KL(policy || start)", ("k2", "k3"))
    text_weight: float = setting(None, "(recipe) weight of the language-model loss on the texts themselves", least=0)
    length_normalize: bool = setting(None, "(recipe) mean over a rationale's tokens (Eq. 8) instead of their sum (Eq. 19)")
    clip_eps: float = setting(0.2, "the probability ratio is clipped to 1 +- this, Eq. 8", above=0)
    minibatches: int = setting(1, "optimizer steps per batch of rollouts (the released code: 4)", least=1)
    lr: float = setting(1e-6, "learning rate of AdamW", above=0)
    lora: int = setting(None, "train adapters of this rank, not the weights; try ten times the rate (needs peft)", least=1)
    lr_decay: bool = setting(False, "let the learning rate fall linearly to 0")
    # How much, over all ranks together
    batch: int = setting(64, "instances per step, B", least=1)
    rollouts: int = setting(8, "rollouts per prompt, K", least=1)
    steps: int = setting(1000, "training steps", least=1)
    temperature: float = setting(None, "(recipe) rollouts are sampled, and scored, at this temperature", above=0)
    seed: int = setting(0, "seed of the data order and of all sampling", least=0)
    # How a text is read: as the checkpoint's grace_config.json says, unless given
    instruction: str = setting(None, "(reading) the system message")
    max_prompt_tokens: int = setting(None, "(reading) token limit of a prompt; longer texts lose their end", least=1)
    max_new_tokens: int = setting(None, "(reading) token limit of a rationale, T", least=1)
    pooling: str = setting(None, "(reading) how hidden states become the embedding, Sec. 5.4", POOLS)
    documents: str = setting(None, "(reading) what a positive or negative is embedded with; prompt: none is written", DOCUMENTS)
    twice: bool = setting(None, "(reading) a prompt holds its text two times, and the second reading counts (Echo embeddings)")
    # Evaluation and the machine
    heldout: str = setting(None, "triplets to evaluate on (default: 1 row in 10 of the data, at most 256)")
    graded: str = setting(None, "sentence pairs with scores, for a Spearman correlation")
    eval_every: int = setting(50, "evaluate, and add to rationales.md, every N steps; 0: only before and after", least=0)
    save_every: int = setting(50, "write a checkpoint to resume from every N steps; 0: only at the end", least=0)
    log_to: str = setting(None, "also send each step's metrics there; the package of that name does it", ("trackio", "wandb"))
    resume: bool = setting(False, "continue from the newest checkpoint under --out")
    overwrite: bool = setting(False, "start afresh in an --out that holds a run or a model, which is deleted")
    tokens_per_batch: int = setting(
        None, "token budget of a micro-batch; lower it when memory is short [16384 on CUDA, else 2048]", least=1
    )
    dtype: str = setting(
        None, "compute type; weights stay float32 [bfloat16 where that is faster, else float32]", ("float32", "bfloat16")
    )
    device: str = setting(None, "default: cuda, mps or cpu, the first that there is")

    def __post_init__(self):
        for name, value in RECIPES.get(self.recipe, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for field in dataclasses.fields(self):
            value, limits, flag = getattr(self, field.name), field.metadata, "--" + field.name.replace("_", "-")
            if value is None:
                continue
            if limits["choices"] and value not in limits["choices"]:
                raise GraceError(f"{flag} {value}: choose one of {', '.join(limits['choices'])}")
            if field.type is float and not math.isfinite(value):
                raise GraceError(f"{flag} {value}: give a finite number")
            if limits["least"] is not None and value < limits["least"]:
                raise GraceError(f"{flag} {value}: must be at least {limits['least']}")
            if limits["above"] is not None and value <= limits["above"]:
                raise GraceError(f"{flag} {value}: must be above {limits['above']}")
        self.device = pick_device(self.device)
        # A micro-batch launches thousands of kernels whatever its size: a GPU that gets small ones waits for the host.
        self.tokens_per_batch = self.tokens_per_batch or (16384 if self.device.startswith("cuda") else 2048)
        if self.mode == "supervised" and not (self.roles and set(self.roles) <= {"query", "positive", "negative"}):
            raise GraceError(f"--train-roles {self.train_roles!r}: give one or more of query,positive,negative")
        if len(set(self.roles)) < len(self.roles):
            raise GraceError(f"--train-roles {self.train_roles!r} names a role twice")
        if self.prompt_weight and self.mode == "unsupervised":
            raise GraceError("--prompt-weight: without labels a text's prompt has no pair; leave it out")
        if self.rollouts == 1:
            raise GraceError("--rollouts 1: a group of one has no advantage and no consistency (Eq. 14, 18); use 2 or more")
        if self.reward == "paper" and self.mode == "supervised" and self.roles != ["positive"]:
            raise GraceError("--reward paper is defined for the positive's rollouts (Eq. 13); use --train-roles positive")
        if self.reward == "infonce" and self.batch == 1:
            raise GraceError("--batch 1: InfoNCE tells an instance from others of its batch; use 2 or more")
        if self.resume and self.overwrite:
            raise GraceError("--resume continues a run and --overwrite starts anew: give one of them")

    def check_roles(self, reading):
        """Raises GraceError if, by the checkpoint's reading, none of the trained roles writes a rationale."""
        if reading.documents == "prompt" and not {"query", "text"} & set(self.roles):
            raise GraceError(f"documents are read by their prompts, so --train-roles {self.train_roles} has to have query")

    def check_groups(self, M):
        """Raises GraceError if the groups of a batch, whose instances have M negatives, cannot be shared out."""
        if "negative" in self.roles and M == 0:
            raise GraceError(f"--train-roles {self.train_roles}: the rows have no negatives")
        groups = self.batch * sum(M if role == "negative" else 1 for role in self.roles)
        if self.minibatches > groups or ranks.size > self.batch:
            raise GraceError(
                f"a batch of {groups} groups cannot be shared out to --minibatches {self.minibatches} and {ranks.size} ranks: "
                "lower them, or give a larger --batch"
            )

    def must_match(self, other):
        """Raises GraceError, naming them, if settings differ from `other`, those of the run in --out, as a dict.

        A resumed run may change how long it goes on, what it writes, and how it is split to fit the memory.
        """
        free = HOW_LONG_AND_WHERE - ({"steps"} if self.lr_decay else set())  # the decaying rate depends on it
        if changed := [k for k, v in dataclasses.asdict(self).items() if k not in free and other.get(k) != v]:
            was = ", ".join(f"{name} was {other.get(name)}" for name in changed)
            raise GraceError(f"--out {self.out} is of another run ({was}): give its settings, or another --out")

    @property
    def reading(self):
        """The settings that override how the checkpoint reads a text, for `Policy.load`; None: as the checkpoint says."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Reading)}

    @property
    def roles(self):
        """The roles that are rolled out K times and trained."""
        return ["text"] if self.mode == "unsupervised" else [r.strip() for r in self.train_roles.split(",") if r.strip()]


def parse(arguments, description):
    """Command-line arguments to a Config: one flag per field."""
    parser = argparse.ArgumentParser("grace.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Config):
        options = {"help": field.metadata["help"] + _shown_default(field), "default": field.default}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": field.type, "choices": field.metadata["choices"]}
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    parser.error = lambda message: parser.exit(2, f"grace.py: {message} (--help lists every setting)\n")
    return Config(**vars(parser.parse_args(arguments)))


def _shown_default(field):
    """The value of a setting that neither the command line nor the checkpoint sets, for --help."""
    if field.name in RECIPES["full"]:
        return f" [full: {RECIPES['full'][field.name]}, paper: {RECIPES['paper'][field.name]}]"
    value = getattr(Reading, field.name, None) if field.metadata["help"].startswith("(reading)") else field.default
    return "" if value is None else f" [{value}]".replace("%", "%%")
