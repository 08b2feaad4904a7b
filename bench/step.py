"""A training step, and the same work by TRL's GRPOTrainer.

    python bench/step.py --model DIR --batch 8 --rollouts 8 --max-new-tokens 48 --train-roles positive --steps 5
    python bench/step.py --shape qwen2.5-0.5b --batch 32 --prompt-tokens 128 --max-new-tokens 256
    python bench/step.py --train-roles query,positive --peer trl             needs `pip install trl`

Runs real steps of grace.py on B rows of made-up texts. The last line is `step_s X`, the median step after one to warm
up. Every flag of grace.py works here but --data: `--kl 0`, `--recipe paper`, `--lora 8`.

With --peer trl both sides start from the same checkpoint, train on the same prompts in the same compute type, and take
turns step by step. TRL's reward runs the model over prompt and completion, pools, and takes a cosine. Neither side
has a KL or a text term. TRL's micro-batches hold as many groups as --tokens-per-batch allows here. Texts of roles that
are not trained are read here alone.
"""

import statistics
import tempfile

import torch
import transformers
from common import clock, fill_in, forward, make_parser, make_texts, show, show_machine

import grace
from config import parse
from policy import load_policies
from rollout import make_batch


def make_trainer(args, rest):
    """A trainer as grace.py builds it. It has B rows, so that every step is the same work."""
    flags = {name: getattr(args, name) for name in ("model", "batch", "rollouts", "max_new_tokens", "device", "dtype", "steps")}
    config = parse([f"--{name.replace('_', '-')}={value}" for name, value in flags.items()] + rest, __doc__)
    policy, reference = load_policies(config)
    texts = make_texts(3 * config.batch, policy, args.prompt_tokens)
    rows = [{"query": q, "positive": p, "negative": [n]} for q, p, n in zip(*[iter(texts)] * 3)]
    rows = rows if config.mode == "supervised" else [{"text": row["query"]} for row in rows]
    return grace.Trainer(policy, reference, rows, config)


def against_trl(ours, step, prompt_tokens, steps):
    """Steps of TRL's trainer on the rows of ours, with a call of `step` after each. Returns their seconds."""
    import datasets
    import trl

    config, tokenizer, bfloat16 = ours.config, ours.policy.tokenizer, ours.config.dtype == "bfloat16"
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).to(config.device)
    by_role = make_batch(ours.rows).texts
    prompts = [ours.policy.template.render(text) for role in config.roles for text in by_role[role]]
    group = prompt_tokens + config.rollouts * config.max_new_tokens  # its padded tokens, in our update
    fitting = [n for n in range(1, len(prompts) + 1) if len(prompts) % n == 0 and n * group <= config.tokens_per_batch]
    micro, seconds = config.rollouts * max(fitting, default=1), []

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
            self.start = clock(config.device)

        def on_step_end(self, *args, **kwargs):
            seconds.append(clock(config.device) - self.start)
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
    return seconds


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=5, help="steps after one to warm up [5]")
    parser.add_argument("--peer", choices=["trl"], help="take turns with another library")
    args, rest = parser.parse_known_args()
    no_terms = ["--kl=0", "--text-weight=0"] if args.peer else []
    trainer, rows, theirs = make_trainer(fill_in(args), ["--train-roles=positive", *no_terms, *rest]), [], {}
    show_machine(args.device, trainer.policy.network)

    def step():
        start = clock(args.device)
        metrics = trainer.step()
        rows.append((clock(args.device) - start, metrics["sample_s"], metrics["length"]))

    if args.peer:
        theirs["TRL"] = against_trl(trainer, step, args.prompt_tokens, args.steps + 1)[1:]
    else:
        for _ in range(args.steps + 1):
            step()
    seconds, sampling, lengths = zip(*rows[1:])
    total, sampled = statistics.median(seconds), statistics.median(sampling)
    print(f"B = {args.batch}, K = {args.rollouts}, {statistics.mean(lengths):.1f} tokens per rationale")
    print(f"sampling {sampled:.4f} s, reward and update {total - sampled:.4f} s")
    if args.device != "cpu" and not args.peer:
        print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    show({"grace.py": seconds, **theirs}, 1, "steps")
    print(f"step_s {total:.4f}")


if __name__ == "__main__":
    main()
