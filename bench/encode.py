"""Texts per second: the encoder against `generate()` and a second forward pass.

    python bench/encode.py [--model DIR | --shape qwen2.5-0.5b] [--n 200] [--batch 32]

Both sides decode greedily, with the same prompts, limits and compute type, and pool the same tokens. The encoder makes
no second pass, reads the instruction once per batch, and drops rows that have ended, which `generate()` goes on
computing. It would also read equal texts only once; here all texts differ.
"""

import torch
from common import fill_in, forward, generate, load_library, make_parser, make_texts, show, show_machine, take_turns

from evaluation.encoder import GraceEncoder


def main():
    parser = make_parser(__doc__, batch=32)  # the default of mteb and sentence-transformers; the encoder has its budget
    parser.add_argument("--repeats", type=int, default=5, help="rounds, after one to warm up [5]")
    parser.add_argument("--n", type=int, default=200, help="how many texts [200]")
    parser.add_argument("--tokens-per-batch", type=int, default=8192, help="of the encoder; more on a large GPU [8192]")
    args = fill_in(parser.parse_args())
    options = dict(device=args.device, dtype=args.dtype, max_new_tokens=args.max_new_tokens)
    policy, model, vectors = GraceEncoder(args.model, **options).policy, load_library(args), {}
    texts = make_texts(args.n, policy, args.prompt_tokens)

    def here():  # a new encoder each time: an old one remembers the texts
        vectors["here"] = torch.tensor(GraceEncoder(policy, tokens_per_batch=args.tokens_per_batch).encode(texts))

    def by_generate_and_forward():
        parts = [texts[i : i + args.batch] for i in range(0, len(texts), args.batch)]
        read = [forward(model, *generate(model, policy, part, do_sample=False))[1].cpu() for part in parts]
        vectors["library"] = torch.cat(read)

    times = take_turns({"encoder": here, "generate() + forward": by_generate_and_forward}, args.device, args.repeats)
    show_machine(args.device, model)
    print(f"{len(texts)} texts; largest difference of embeddings {(vectors['here'] - vectors['library']).abs().max():.1e}")
    show(times, len(texts), "texts")


if __name__ == "__main__":
    main()
