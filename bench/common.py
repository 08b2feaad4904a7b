"""What the benchmarks share: a model of a named shape, made-up texts, a stopwatch that waits for the GPU, and what the
machine can do at most: the two rates by which a measured time is judged.
"""

import functools
import os
import platform
import random
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch  # noqa: E402
import transformers  # noqa: E402

from policy import Policy  # noqa: E402
from prompt import Reading  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {  # random weights of these sizes: the Qwen2 architecture, tied embeddings
    "qwen2.5-0.5b": dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151936, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "6.6m": dict(
        hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=8000,
    ),
    "0.4m": dict(
        hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=192,
    ),
}  # fmt: skip
WORDS = (
    "the a one this every some old young green quiet angry happy tall small new broken bright heavy child doctor "
    "teacher sailor farmer painter king neighbour found sold carried painted mended lost bought opened lamp boat "
    "letter table garden bridge coat drum near under behind inside beside above river forest station market house "
    "hill street harbour yesterday today tonight early late often"
).split()
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def add_model_flags(parser, shape="6.6m"):
    """--model or --shape, and the lengths that a benchmark is about."""
    parser.add_argument("--model", help="checkpoint folder or hub id (default: random weights of --shape)")
    parser.add_argument("--shape", default=shape, choices=SHAPES, help=f"which random weights [{shape}]")
    parser.add_argument("--vocab", type=int, help="another vocabulary size for --shape")
    parser.add_argument("--hidden", type=int, help="another hidden size for --shape, the MLP in proportion")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="the longest rationale, T [48]")
    parser.add_argument("--prompt-tokens", type=int, default=200, help="about how long a made-up prompt is [200]")
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--dtype", default=None, help="compute type [bfloat16 on CUDA, else float32]")


def word_tokenizer(vocab):
    """A word-level tokenizer of exactly `vocab` entries: special tokens, `WORDS`, then made-up words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    entries = ["<unk>", "<pad>", "<end>", "<system>", "<user>", "<assistant>", *dict.fromkeys(WORDS)]
    entries += [f"w{i}" for i in range(vocab - len(entries))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(entries[:vocab])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<end>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def load_policy(args):
    """The policy a benchmark runs: a checkpoint, or random weights, to which all tokens are about equally likely."""
    dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    if args.model:
        return Policy.load(args.model, args.device, dtype, max_new_tokens=args.max_new_tokens)
    settings = SHAPES[args.shape] | ({"vocab_size": args.vocab} if args.vocab else {})
    if args.hidden:
        settings |= {"hidden_size": args.hidden, "intermediate_size": 3 * args.hidden}
    tokenizer = word_tokenizer(settings["vocab_size"])
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        **settings, tie_word_embeddings=True, max_position_embeddings=32768,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).to(args.device)
    return Policy(model, tokenizer, Reading("name what happened", 4096, args.max_new_tokens), dtype)


def make_texts(n, policy, tokens, seed=0):
    """n different texts whose prompts have about `tokens` tokens."""
    rng, empty = random.Random(seed), policy.prompts(["x"]).ids.shape[1]
    count = max(2, tokens - empty)  # words; most of them are one token each in any tokenizer
    return [" ".join(rng.choices(WORDS, k=max(2, count - rng.randrange(max(1, count // 10))))) for _ in range(n)]


def machine(device="cpu"):
    """One line on where a table was made."""
    where = torch.cuda.get_device_name() if str(device).startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    return f"{where}, torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"


def clock(device="cpu"):
    """Seconds, once the GPU has finished all its work."""
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function, device="cpu", repeats=5):
    """The median time of a call, after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = clock(device)
        function()
        times.append(clock(device) - start)
    return statistics.median(times)


def copy_rate(device="cpu", n=None):
    """Bytes per second that the memory moves, measured by copying n float32 numbers: each is read and written."""
    x = torch.zeros(n or (2**28 if str(device).startswith("cuda") else 2**24), device=device)
    y = torch.zeros_like(x)  # written once, so that its pages exist
    return 2 * x.nbytes / seconds(lambda: y.copy_(x), device)


@functools.cache
def matmul_rate(device="cpu", precision="float32", n=None):
    """Operations per second, measured by a product of n x n matrices, once: "float32" (IEEE), "tf32" or "bfloat16"."""
    n = n or (8192 if str(device).startswith("cuda") else 1024)
    x = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        return 2 * n**3 / seconds(lambda: x @ x, device)
    finally:
        torch.set_float32_matmul_precision(before)


def goal(what, wanted, reached):
    """A line that bench/gpu.sh gathers into the table at the top of its page."""
    print(f"goal | {what} | {wanted} | {reached} |")
