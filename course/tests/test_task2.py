"""Task 2: sampling, against a small network that reads each prompt and its rationale again, as a whole."""

import itertools

import pytest
import torch

import policy as policies
import rollout
from prompt import Reading
from worlds.make import build_tokenizer

# ---------------------------------------------------------------- one draw


@pytest.mark.points(2)
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_draws_follow_the_softmax_at_a_temperature(generator, temperature):
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    token, logprob = rollout.draw(logits.expand(40_000, 4), temperature, torch.rand(40_000, generator=generator))
    expected = torch.softmax(logits / temperature, -1)
    assert token.shape == logprob.shape == (40_000,)
    assert (torch.bincount(token, minlength=4) / 40_000 - expected).abs().max() < 0.01
    torch.testing.assert_close(logprob, expected.log()[token])


@pytest.mark.points(1)
def test_the_unlikely_is_drawn_too(generator):
    logits = torch.linspace(0, 3, 200)
    token, _ = rollout.draw(logits.expand(40_000, 200), 1.0, torch.rand(40_000, generator=generator))
    unlikely = torch.softmax(logits, -1)[:150].sum()
    assert abs((token < 150).float().mean() - unlikely) < 0.01, "no top-k, no top-p"


@pytest.mark.points(1)
def test_greedy_takes_the_likeliest_and_scores_it_at_one(rand):
    logits = rand(50, 9)
    token, logprob = rollout.draw(logits, 0.0)
    best = torch.log_softmax(logits, -1).max(1)
    assert torch.equal(token, best.indices)
    torch.testing.assert_close(logprob, best.values)


@pytest.mark.points(1)
def test_a_row_draws_by_its_own_number_alone(generator):
    """The same numbers give the same tokens, in whatever batch a row stands."""
    uniform = torch.rand(99, generator=generator)
    tokens = rollout.draw(torch.zeros(99, 50), 1.0, uniform)[0]
    assert len(tokens.unique()) > 20
    order = torch.randperm(99, generator=generator)[:40]
    assert torch.equal(rollout.draw(torch.zeros(40, 50), 1.0, uniform[order])[0], tokens[order])


@pytest.mark.points(1)
def test_what_is_drawn_at_the_ends_of_the_range_is_possible(generator):
    """0, and the largest float32 below 1: neither draws an impossible token, nor one behind the vocabulary's last."""
    ends = torch.tensor([0.0, 1 - 2**-24])
    for logits in (torch.tensor([-1e4, 0.0, 1.0, -1e4]), *torch.randn(50, 5000, generator=generator)):
        token, logprob = rollout.draw(logits.expand(2, -1), 1.0, ends)
        assert (token < len(logits)).all() and (logprob > -1e3).all()


# ---------------------------------------------------------------- the loop

TEXTS = ["the angry doctor bought the lamp near the forest around noon .", "somebody sold the boat", "the boat"]
N, K, ENDS = len(TEXTS), 6, [7, 8]
CASES = pytest.mark.parametrize(  # temperature; is the instruction read once for all; the decoder's `look_every`; T
    "case", [(0.6, True, 1, 6), (1.0, False, 1, 40), (1.0, True, 16, 40), (0, True, 1, 6)], ids=str
)


@pytest.fixture(scope="module")
def network():
    """A random network whose vocabulary ends at token 8. 7 and 8 are end tokens; 0 is a token like any other."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.1, bos_token_id=None, **sizes))
    reading = Reading("Say what happened .", max_prompt_tokens=64, pooling="penultimate")
    network = policies.Policy(model.double(), tokenizer, reading)
    network.end_ids, whole = torch.tensor(ENDS), network.logits
    network.logits = lambda hidden: whole(hidden)[..., :9]
    return network


@pytest.fixture
def sample(network, generator, monkeypatch):
    """`sample` for a case. Returns its rollouts, `uniform`, how many rows and positions the network read in each pass,
    and the poolings that `fold` was called with. In the place of task 1 stands a plain sum.
    """
    ways, shapes, decoder = set(), [], network.decoder

    def fold(state, hidden, mask, how="mean"):
        ways.add(how)
        new = torch.where(mask[..., None].bool(), hidden, 0).sum(1)
        return new if state is None else state + new

    def run(case, writes=None):
        temperature, share, look_every, T = case

        def made(*args):
            made = decoder(*args)
            made.look_every = look_every
            return made

        monkeypatch.setattr(network, "decoder", made)
        monkeypatch.setattr(network.reading, "max_new_tokens", T)
        uniform = torch.rand(N, K, T, generator=generator)
        hook = network.base.register_forward_hook(lambda *x: shapes.append(tuple(x[2][0].shape[:2])))
        prompts = network.template(TEXTS, share=share)
        rollouts = rollout.sample(network, prompts, K, temperature, uniform if temperature else None, writes)
        hook.remove()
        return rollouts, uniform, shapes, ways

    monkeypatch.setattr(rollout, "fold", fold)
    return run


@torch.no_grad()
def read_again(network, rollouts, n, k):
    """A rationale's ids, the logits `[t, V]` that its tokens are drawn from, and the sums of the states that are pooled,
    of the prompt and of the rationale.
    """
    counts, written = rollouts.prompt_mask[n].bool(), rollouts.mask[n, k].bool()
    ids = torch.cat([rollouts.prompt_ids[n][counts], rollouts.ids[n, k][written]])
    states = network.model(input_ids=ids[None], output_hidden_states=True, use_cache=False).hidden_states
    first, to_pool = int(counts.sum()), states[-2 if network.reading.pooling == "penultimate" else -1][0]
    of_prompt = to_pool[:first][rollouts.counted[n][counts].bool()].sum(0)
    return ids[first:], network.logits(states[-1][0, first - 1 : -1]), of_prompt, to_pool[first:].sum(0)


@pytest.mark.points(3)
@CASES
def test_a_rationale_is_what_is_drawn_up_to_the_end_token(sample, network, case):
    """The end token is part of it, token 0 is a token, and the longest rationale sets the width."""
    rollouts, uniform, *_ = sample(case)
    lengths = rollouts.mask.sum(-1)
    assert rollouts.ids.shape == rollouts.mask.shape == rollouts.logprobs.shape == (N, K, lengths.max())
    assert torch.equal(rollouts.mask.bool(), torch.arange(int(lengths.max())) < lengths[..., None])
    for name in ("ids", "logprobs"):
        assert getattr(rollouts, name)[rollouts.mask == 0].eq(0).all(), f"{name} is 0 where masked"
    for n, k in itertools.product(range(N), range(K)):
        ids, logits, *_ = read_again(network, rollouts, n, k)
        token, logprob = rollout.draw(logits, case[0], uniform[n, k, : len(ids)])
        assert ids.tolist() == token.tolist()
        torch.testing.assert_close(rollouts.logprobs[n, k, : len(ids)], logprob, rtol=1e-6, atol=1e-6)
        ends = [i in ENDS for i in ids.tolist()]
        assert not any(ends[:-1]) and bool(rollouts.finished[n, k]) == ends[-1] and (ends[-1] or len(ids) == case[3])


@pytest.mark.points(3)
@CASES
@pytest.mark.parametrize("pooling", ["penultimate", "halves"])
def test_text_and_rationale_are_pooled_up_to_the_end_token(sample, network, case, pooling, monkeypatch):
    """The last token too: `generate()` leaves it out, Eq. 11 counts it. In halves, prompt and rationale have one vote each."""
    monkeypatch.setattr(network.reading, "pooling", pooling)
    rollouts, _, _, ways = sample(case)
    unit = lambda x: x / x.norm()
    for n, k in itertools.product(range(N), range(K)):
        *_, prompt, rationale = read_again(network, rollouts, n, k)
        pooled = unit(prompt) + unit(rationale) if pooling == "halves" else prompt + rationale
        torch.testing.assert_close(rollouts.embeddings[n, k], unit(pooled), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rollouts.prompt_embeddings[n], unit(prompt), rtol=1e-6, atol=1e-6)
    assert ways == {pooling}, "pooled as policy.reading.pooling says"


@pytest.mark.points(1)
def test_where_nothing_is_to_be_written_the_prompt_is_all(sample):
    """There `writes` is False: K empty rationales, finished, with the prompt's embedding."""
    rollouts, *_ = sample((1.0, True, 1, 6), torch.arange(N) != 1)
    wrote = rollouts.mask.any(-1)
    assert not wrote[1].any() and rollouts.finished[1].all() and wrote.sum() == (N - 1) * K
    torch.testing.assert_close(rollouts.embeddings[1], rollouts.prompt_embeddings[[1] * K], rtol=1e-12, atol=1e-12)


@pytest.mark.points(2)
@CASES
def test_a_prompt_is_read_once_and_the_loop_ends_with_the_last_rationale(sample, case):
    """One pass for the instruction, one for the texts, then one per token."""
    rollouts, _, shapes, _ = sample(case)
    prefills = [rows for rows, positions in shapes if positions > 1]
    assert len(prefills) <= 2 and max(prefills) <= N
    assert 0 <= len(shapes) - len(prefills) - rollouts.ids.shape[2] < case[2], "with `look_every` 16 the end is noticed late"
