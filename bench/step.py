"""A training step, against one by TRL's GRPOTrainer, or against one of InfoNCE as a loss.

    python bench/step.py --model DIR --batch 8 --rollouts 8 --max-new-tokens 48 --train-roles positive --steps 5
    python bench/step.py --shape qwen2.5-0.5b --batch 32 --prompt-tokens 128 --max-new-tokens 256
    python bench/step.py --train-roles query,positive --peer trl             needs `pip install trl`
    python bench/step.py --train-roles query,positive --peer loss

Runs real steps of grace.py on B rows of made-up texts. The last line is `step_s X`, the median step after one to warm
up. Every flag of grace.py works here but --data: `--kl 0`, `--recipe paper`, `--lora 8`.

With a peer both sides start from the same checkpoint, train on the same rows in the same compute type, and take turns
step by step. On a CPU the products of matrices in a step are counted, too: what each side has to compute.

TRL's reward runs the model over prompt and completion, pools, and takes a cosine. Neither side has a KL or a text term then.
TRL's micro-batches hold as many groups as --tokens-per-batch allows here. Texts of roles that are not trained are read
here alone.
"""

import statistics
import tempfile

import torch
import transformers
from common import clock, fill_in, forward, make_parser, make_texts, show, show_machine
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import grace
from config import parse
from experiments.baselines import Contrastive
from policy import load_policies
from rollout import make_batch

aten = torch.ops.aten
ATTENTION = {  # torch has no count for its own attention on a CPU
    aten._scaled_dot_product_flash_attention_for_cpu: lambda *x, **_: sdpa_flop_count(*x[:3]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *x, **_: sdpa_backward_flop_count(*x[:4]),
}


class Side:
    """One side of a comparison, as a context of each of its steps: their `seconds`, and what the first, a warm-up, computes.

    flops: of the products of matrices in that step, forward and backward. On a GPU 0: a graph that is replayed is not seen.
    """

    def __init__(self, device):
        self.device, self.seconds, self.counter = device, [], FlopCounterMode(display=False, custom_mapping=ATTENTION)

    def __enter__(self):
        if self.device == "cpu" and not self.seconds:
            self.counter.__enter__()
        self.start = clock(self.device)

    def __exit__(self, *error):
        self.seconds.append(clock(self.device) - self.start)
        if self.device == "cpu" and len(self.seconds) == 1:
            self.counter.__exit__(*error)

    @property
    def flops(self):
        return self.counter.get_total_flops()


def make_trainer(args, rest, kind=grace.Trainer):
    """A trainer as grace.py builds it, or of another kind. It has B rows, so that every step is the same work."""
    flags = {name: getattr(args, name) for name in ("model", "batch", "rollouts", "max_new_tokens", "device", "dtype", "steps")}
    config = parse([f"--{name.replace('_', '-')}={value}" for name, value in flags.items()] + rest, __doc__)
    policy, reference = load_policies(config)
    texts = make_texts(3 * config.batch, policy, args.prompt_tokens)
    rows = [{"query": q, "positive": p, "negative": [n]} for q, p, n in zip(*[iter(texts)] * 3)]
    rows = rows if config.mode == "supervised" else [{"text": row["query"]} for row in rows]
    return kind(policy, reference, rows, config)


def against_trl(ours, step, prompt_tokens, steps):
    """Steps of TRL's trainer on the rows of ours, with a call of `step` after each. `-> Side`."""
    import datasets
    import trl

    config, tokenizer, bfloat16 = ours.config, ours.policy.tokenizer, ours.config.dtype == "bfloat16"
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).to(config.device)
    by_role = make_batch(ours.rows).texts
    prompts = [ours.policy.template.render(text) for role in config.roles for text in by_role[role]]
    group = prompt_tokens + config.rollouts * config.max_new_tokens  # its padded tokens, in our update
    fitting = [n for n in range(1, len(prompts) + 1) if len(prompts) % n == 0 and n * group <= config.tokens_per_batch]
    micro, side = config.rollouts * max(fitting, default=1), Side(config.device)

    def by_cosine(prompts, completions, **_):
        """How near each completion's embedding is to the next one's: any reward by embeddings costs as much."""
        rows, vectors = [a + b for a, b in zip(prompts, completions)], []
        for start in range(0, len(rows), micro):
            x = tokenizer(rows[start : start + micro], return_tensors="pt", padding=True).to(config.device)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
                vectors.append(forward(model, x.input_ids, x.attention_mask, x.attention_mask)[1])
        vectors = torch.cat(vectors)
        return (vectors * vectors.roll(1, 0)).sum(1).tolist()

    class InTurn(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            side.__enter__()

        def on_step_end(self, *args, **kwargs):
            side.__exit__(None, None, None)
            step()

    with tempfile.TemporaryDirectory() as out:
        settings = trl.GRPOConfig(
            out, per_device_train_batch_size=micro, gradient_accumulation_steps=len(prompts) * config.rollouts // micro,
            num_generations=config.rollouts, max_completion_length=config.max_new_tokens, temperature=config.temperature,
            max_steps=steps, beta=0.0, learning_rate=config.lr, bf16=bfloat16, use_cpu=config.device == "cpu",
            gradient_checkpointing=False, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        data = datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts])
        trainer = trl.GRPOTrainer(
            model, by_cosine, settings, train_dataset=data, processing_class=tokenizer, callbacks=[InTurn()]
        )
        trainer.train()
    print(f"TRL {trl.__version__}, micro-batches of {micro} completions")
    return side


def against_loss(loss, step, steps):
    """Steps of a trainer with a loss, with a call of `step` after each. `-> Side`."""
    side = Side(loss.config.device)
    for _ in range(steps):
        with side:
            loss.step()
        step()
    return side


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--rollouts", type=int, default=8, help="K, rationales per text [8]")
    parser.add_argument("--steps", type=int, default=5, help="steps after one to warm up [5]")
    parser.add_argument("--peer", choices=["trl", "loss"], help="take turns with another library, or with a loss")
    args, rest = parser.parse_known_args()
    flags = ["--train-roles=positive", *(["--kl=0", "--text-weight=0"] if args.peer == "trl" else []), *rest]
    trainer, rows, sides = make_trainer(fill_in(args), flags), [], {"grace.py": Side(args.device)}
    show_machine(args.device, trainer.policy.network)

    def step():
        with sides["grace.py"]:
            metrics = trainer.step()
        rows.append((metrics["sample_s"], metrics["length"]))

    if args.peer == "trl":
        sides["TRL"] = against_trl(trainer, step, args.prompt_tokens, args.steps + 1)
    elif args.peer == "loss":
        sides["InfoNCE as a loss"] = against_loss(make_trainer(args, flags, Contrastive), step, args.steps + 1)
    else:
        for _ in range(args.steps + 1):
            step()
    seconds, (sampling, lengths) = {name: side.seconds[1:] for name, side in sides.items()}, zip(*rows[1:])
    total, sampled = statistics.median(seconds["grace.py"]), statistics.median(sampling)
    print(f"B = {args.batch}, K = {args.rollouts}, {statistics.mean(lengths):.1f} tokens per rationale")
    print(f"sampling {sampled:.4f} s, reward and update {total - sampled:.4f} s")
    if args.device != "cpu" and not args.peer:
        print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    show(seconds, 1, "steps")
    for name, side in sides.items():
        if side.flops:
            print(f"{name:24}{side.flops / 1e9:10.3f} Gflop{side.flops / sides['grace.py'].flops:28.2f} x")
    print(f"step_s {total:.4f}")


if __name__ == "__main__":
    main()
