"""Task 2: sampling, against scripted answers and against a full forward pass of a small network."""

import itertools
import types

import pytest
import torch

import policy as policies
import pool
import rollout
from prompt import Reading
from worlds.make import build_tokenizer

pytestmark = pytest.mark.task2


@pytest.fixture(autouse=True)
def poolings(monkeypatch):
    """Plain stand-ins for task 1. The value of this fixture: the ways to pool that `fold` was called with."""
    ways = set()

    def fold(state, hidden, mask, how="mean"):
        ways.add(how)
        new = sum(torch.where(mask[:, i : i + 1].bool(), hidden[:, i], 0) for i in range(hidden.shape[1]))
        return new if state is None else state + new

    def length_mask(lengths, width):
        return torch.tensor([[i < n for i in range(width)] for n in lengths.tolist()])

    for module in (pool, rollout, policies):
        for function in (fold, length_mask):
            if hasattr(module, function.__name__):
                monkeypatch.setattr(module, function.__name__, function)
    return ways


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


# ---------------------------------------------------------------- the loop, scripted

SCRIPT = [  # each row's tokens, if it never ended; 7 and 8 are end tokens, 0 is an ordinary one
    [3, 0, 0, 7, 5, 5],
    [8, 1, 1, 1, 1, 1],
    [0, 2, 4, 6, 2, 1],
    [1, 0, 2, 3, 4, 8],
]
DROPS = pytest.mark.parametrize("drops", [False, True], ids=["keeps-rows", "drops-rows"])


class Scripted:
    """A policy and its decoder that write a script. The state to pool tells which token of which row has been fed.

    drops: whether `drop_finished` takes the rows that have ended out of the batch
    """

    look_every = 1

    def __init__(self, script, drops=False):
        self.reading = types.SimpleNamespace(max_new_tokens=6, pooling="penultimate")
        self.end_ids, self.fed, self.script, self.drops = torch.tensor([7, 8]), [], script, drops
        self.rows = torch.arange(len(script))

    def state(self, t):
        """What predicts token t of each row: certain of it."""
        states = torch.zeros(len(self.script), 9)
        for row, tokens in enumerate(self.script):
            states[row, tokens[t] if t < 6 else 5] = 50.0
        return states

    def to_pool(self, t):
        return torch.arange(len(self.script) * 9.0).view(-1, 9) + 100.0 * t

    def logits(self, hidden):
        return hidden

    def step(self, token):
        assert len(token) == len(self.rows), "one token for each of decoder.rows"
        self.fed.append(token.tolist())
        t = len(self.fed)
        return self.state(t)[self.rows][:, None], self.to_pool(t)[self.rows][:, None]

    def drop_finished(self, writing):
        if self.drops:
            self.rows = self.rows[writing[self.rows]]

    def run(self, uniform=None):
        n = len(self.script)
        uniform = torch.full((n, 6), 0.5) if uniform is None else uniform
        return rollout.write(self, self, self.state(0), torch.zeros(n, 9), 1.0, uniform)


class Undecided(Scripted):
    """Every token is equally likely."""

    def state(self, t):
        return torch.zeros(len(self.script), 9)


@pytest.mark.points(2)
@DROPS
def test_a_rationale_is_its_tokens_with_the_end_token(drops):
    ids, logprobs, lengths, finished, _ = Scripted(SCRIPT, drops).run()
    assert lengths.tolist() == [4, 1, 6, 6], "the end token is part of it; token 0 is a token"
    assert finished.tolist() == [True, True, False, True], "the third was truncated, the fourth ended in time"
    for row, n in enumerate(lengths):
        assert ids[row, :n].tolist() == SCRIPT[row][:n]
        assert logprobs[row, :n].abs().max() < 1e-4


@pytest.mark.points(2)
@DROPS
@pytest.mark.parametrize("rows, steps", [(slice(0, 4), 6), (slice(0, 2), 4)])
def test_every_token_is_fed_and_pooled_once(rows, steps, drops, poolings):
    """The last token too: `generate()` leaves it out, Eq. 11 counts it. Nothing after the end; the loop ends with the last."""
    scripted = Scripted(SCRIPT[rows], drops)
    _, _, lengths, _, state = scripted.run()
    assert len(scripted.fed) == steps and scripted.fed[0] == [tokens[0] for tokens in scripted.script]
    expected = [sum((scripted.to_pool(t + 1)[row] for t in range(n)), torch.zeros(9)) for row, n in enumerate(lengths.tolist())]
    torch.testing.assert_close(state, torch.stack(expected))
    assert poolings == {"penultimate"}, "pooled as policy.reading.pooling says"


@pytest.mark.points(1)
@DROPS
def test_a_rollout_draws_at_each_position_by_the_number_there(drops, generator):
    """Row r of `uniform` belongs to rollout r, whichever rows are still in the batch."""
    uniform = torch.rand(40, 6, generator=generator)
    ids, _, lengths, _, _ = Undecided([[0] * 6] * 40, drops).run(uniform)
    assert lengths.unique().numel() > 2, "rationales of one length would prove little"
    for row, n in enumerate(lengths):
        assert ids[row, :n].tolist() == rollout.draw(torch.zeros(n, 9), 1.0, uniform[row, :n])[0].tolist()


# ---------------------------------------------------------------- the loop, on a network


@pytest.fixture(scope="module")
def network():
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    ends = list(range(5, 150, 6))
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, eos_token_id=ends, bos_token_id=None, **sizes)
    reading = Reading("Say what happened .", max_prompt_tokens=64, max_new_tokens=6)
    return policies.Policy(LlamaForCausalLM(config).double(), tokenizer, reading)


TEXTS = ["the angry doctor bought the lamp near the forest around noon .", "somebody sold the boat"]


@pytest.mark.points(3)
def test_what_the_loop_captures_is_what_a_full_forward_pass_gives(network, generator):
    temperature, uniform = 0.6, torch.rand(2, 4, 6, generator=generator)
    rollouts = rollout.sample(network, network.prompts(TEXTS), 4, temperature, uniform)
    assert rollouts.mask.sum(-1).unique().numel() > 1, "rationales of one length would prove little"
    for n, k in itertools.product(range(2), range(4)):
        prompt = rollouts.prompt_ids[n][rollouts.prompt_mask[n].bool()]
        rationale = rollouts.ids[n, k][rollouts.mask[n, k].bool()]
        counted = torch.cat([rollouts.counted[n][rollouts.prompt_mask[n].bool()], torch.ones_like(rationale)]).bool()
        with torch.no_grad():
            out = network.model(input_ids=torch.cat([prompt, rationale])[None], output_hidden_states=True, use_cache=False)
        logprobs = torch.log_softmax(out.logits[0, len(prompt) - 1 : -1] / temperature, -1).gather(1, rationale[:, None])[:, 0]
        mean = out.hidden_states[-1][0][counted].mean(0)
        torch.testing.assert_close(rollouts.logprobs[n, k][rollouts.mask[n, k].bool()], logprobs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rollouts.embeddings[n, k], mean / mean.norm(), rtol=1e-5, atol=1e-5)
        ends = torch.isin(rationale, network.end_ids)
        assert not ends[:-1].any() and bool(ends[-1]) == bool(rollouts.finished[n, k])


@pytest.mark.points(1)
def test_a_prompt_is_read_once(network, generator):
    """One prefill for the instruction, one for the texts, then one step per token."""
    lengths = []
    hook = network.base.register_forward_hook(lambda *x: lengths.append(x[2][0].shape[1]))
    rollout.sample(network, network.prompts(TEXTS), 4, 1.0, torch.rand(2, 4, 6, generator=generator))
    hook.remove()
    assert len(lengths) <= 2 + 6 and sum(n > 1 for n in lengths) <= 2
