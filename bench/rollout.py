"""Rollouts against `generate()`, and against `generate()` with the forward pass that rewards and updates need.

    python bench/rollout.py [--model DIR | --shape qwen2.5-0.5b] [--batch 8] [--rollouts 8]

All sides sample K rationales of the same B prompts at temperature 1, in the same compute type. rollout.py captures
log-probabilities and embeddings while it decodes. After `generate()` the model has to read everything once more; it does
so for one text at a time, since the logits of all rationales would not fit into memory.
"""

import torch
from common import fill_in, forward, generate, load_library, make_parser, make_texts, show, show_machine, take_turns

from policy import Policy
from rollout import sample, uniforms


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--rollouts", type=int, default=8, help="K, rationales per text [8]")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, after one to warm up [5]")
    args = fill_in(parser.parse_args())
    policy = Policy.load(args.model, args.device, args.dtype, max_new_tokens=args.max_new_tokens)
    model, texts, K = load_library(args), make_texts(args.batch, policy, args.prompt_tokens), args.rollouts
    uniform = uniforms(0, args.batch, K, args.max_new_tokens, device=args.device)
    P = policy.template(texts, share=False).ids.shape[1]

    def here():
        return sample(policy, policy.template(texts), K, 1.0, uniform)

    def by_generate():
        return generate(model, policy, texts, K, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)

    @torch.no_grad()
    def by_generate_and_forward():
        for ids, mask, counted in zip(*(x.split(K) for x in by_generate())):
            hidden, embeddings = forward(model, ids, mask, counted)
            logits = model.lm_head(hidden[:, P - 1 : -1]).float()  # the state before a token predicts it
            torch.log_softmax(logits, -1).gather(2, ids[:, P:, None])

    sides = {"rollout.py": here, "generate()": by_generate, "generate() + forward": by_generate_and_forward}
    times, tokens = take_turns(sides, args.device, args.repeats), int(here().mask.sum())
    show_machine(args.device, model)
    print(f"{args.batch} prompts, K = {K}, T = {args.max_new_tokens}; {tokens} tokens sampled by rollout.py")
    show(times, tokens, "tokens")


if __name__ == "__main__":
    main()
