"""What the benchmarks share: a model, made-up texts, the library's way to write and embed, a stopwatch.

Speed depends on the sizes of a model, not on what it has learned. So where no checkpoint is given, random weights of
a named shape are written once to runs/bench/, and all sides of a comparison load that folder.
"""

import argparse
import os
import random
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch  # noqa: E402
import transformers  # noqa: E402

from policy import Policy  # noqa: E402
from pool import mean_pool  # noqa: E402
from prompt import Reading  # noqa: E402
from worlds.make import SPECIAL_TOKENS, build_tokenizer  # noqa: E402

SIZES = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"
SHAPES = {  # for the Llama architecture: of a Qwen2, the library would load its own tokenizer
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936),
    "6.6m": (256, 768, 6, 8, 4, 8000),
    "tiny": (32, 64, 2, 4, 2, 128),
}
WORDS = "a the old young red small doctor sailor king found sold carried lamp boat letter coat near behind river house".split()


def make_parser(description, **defaults):
    """A command line with the flags that every benchmark with a model has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="checkpoint folder or hub id (default: random weights of --shape)")
    parser.add_argument("--shape", default="6.6m", choices=SHAPES, help="the size of random weights [6.6m]")
    parser.add_argument("--batch", type=int, default=8, help="B, texts at a time [%(default)s]")
    parser.add_argument("--prompt-tokens", type=int, default=200, help="length of a made-up prompt, instruction included [200]")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="T, the longest rationale [48]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute type [bfloat16 on CUDA, else float32]")
    parser.set_defaults(**defaults)
    return parser


def fill_in(args):
    """Settles what depends on other flags: the compute type, and the folder of the model."""
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    args.model = args.model or write_model(args.shape, os.path.join("runs", "bench", f"llama-{args.shape}"))
    return args


# ---------------------------------------------------------------- a model and texts


def write_model(shape, folder):
    """Write a checkpoint folder with random weights of a shape, unless it is there. Returns the folder."""
    if os.path.isfile(os.path.join(folder, "grace_config.json")):  # it is written last
        return folder
    sizes = dict(zip(SIZES, SHAPES[shape]))
    more = sizes["vocab_size"] - len(WORDS) - len(SPECIAL_TOKENS)
    tokenizer = build_tokenizer([*WORDS, *(f"w{i}" for i in range(more))])  # whatever is sampled is a word
    torch.manual_seed(0)
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    config = transformers.LlamaConfig(**sizes, **ends, tie_word_embeddings=True, max_position_embeddings=8192)
    model = transformers.LlamaForCausalLM(config)
    Policy(model, tokenizer, Reading("name what happened", max_prompt_tokens=4096)).save(folder)
    return folder


def make_texts(n, policy, tokens):
    """n different texts whose prompts have about 0.9 to 1 times as many tokens."""
    empty, every = (policy.template([text]).ids.shape[1] for text in ("", " ".join(WORDS)))
    words = (tokens - empty) * len(WORDS) // (every - empty)  # a word may be more than one token
    if words < 2:
        sys.exit(f"--prompt-tokens {tokens}: instruction and template alone have {empty}")
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=words - rng.randrange(words // 10 + 1))) for _ in range(n)]


# ---------------------------------------------------------------- the library's way


def load_library(args):
    """The same checkpoint as transformers loads it, with its weights in the compute type."""
    return transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device).eval()


def generate(model, policy, texts, K=1, **how):
    """K rationales per text by `generate()`. Returns ids, what is a token, and what counts: `[n*K, P + T]` each."""
    x = policy.template(texts, share=False)  # plain left padding
    ids = model.generate(
        input_ids=x.ids, attention_mask=x.mask, num_return_sequences=K, max_new_tokens=policy.reading.max_new_tokens,
        eos_token_id=policy.end_ids.tolist(), pad_token_id=int(policy.end_ids[0]), **how,
    )  # fmt: skip
    ended = torch.isin(ids[:, x.ids.shape[1] :], policy.end_ids).long()
    rationale = ((ended.cumsum(1) - ended) == 0).long()  # up to the first end token, which counts
    return ids, *(torch.cat([of_prompt.repeat_interleave(K, 0), rationale], 1) for of_prompt in (x.mask, x.counted))


@torch.no_grad()
def forward(model, ids, mask, counted):
    """A second pass over whole rows: hidden states `[n, P + T, D]`, and the embeddings `[n, D]` that they give."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = model.base_model(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    return hidden, mean_pool(hidden, counted)


# ---------------------------------------------------------------- time


def clock(device):
    """Seconds, once the GPU has finished all its work."""
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(sides, device, repeats):
    """Call each function of `{name: function}` in turn. Returns the seconds of each call, `{name: [repeats]}`.

    In turn, because a machine's speed drifts within minutes. A first round warms up and is not counted.
    """
    times = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, function in sides.items():
            start = clock(device)
            function()
            times[name].append(clock(device) - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def show(times, count, unit):
    """Print a line per side: median seconds, how many units that is per second, and the median ratio to the first side."""
    first = next(iter(times.values()))
    for name, seconds in times.items():
        median, ratio = statistics.median(seconds), statistics.median(x / y for x, y in zip(seconds, first))
        print(f"{name:24}{median:10.4f} s{count / median:12.2f} {unit}/s{ratio:8.2f} x")


def show_machine(device, model=None):
    """Print where a table was measured, with which versions, and of a model of which size."""
    where = torch.cuda.get_device_name() if str(device).startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, torch {torch.__version__}, transformers {transformers.__version__}")
    if model:
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {model.dtype}")
