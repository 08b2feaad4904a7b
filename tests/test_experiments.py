"""Experiments: algorithms, baselines and measurements against loops, records, and the page that is made of them."""

import dataclasses
import functools
import itertools
import math
import re
import shlex

import pytest
import torch
from conftest import ROWS, TEXTS, by_full_forward, config, embedded, infonce_terms, rolled, start

from config import parse
from evaluation.tasks import evaluate_triplets
from experiments import page, real, records, run
from experiments.algorithms import ALGORITHMS, DAPO, GRPO, ReinforcePlusPlus, ReMax
from experiments.baselines import Contrastive, ForcedContrastive, PathwiseAlone, SimCSE, longest
from experiments.measure import answers_loss, follow_other, measure
from experiments.runs import TABLES, WALK
from plumbing.errors import GraceError
from rollout import make_batch, roll_out, sample
from worlds.make import build_world, write_rows

# ---------------------------------------------------------------- algorithms


def prepared(policy, algorithm, **settings):
    """A trainer of an algorithm, rewards, and the batch as its `advantage` gets it."""
    trainer, batch = algorithm(policy, None, ROWS, config(**settings)), make_batch(ROWS)
    batch.rollouts, batch.embeddings, *_ = roll_out(policy, batch.texts, trainer.config, 0)
    return trainer, torch.randn(batch.rollouts.finished.shape, generator=torch.Generator().manual_seed(2)), batch


def deviations(rewards, ddof=0):
    """Each reward less their mean, over their standard deviation."""
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - ddof))
    return [(r - mean) / std for r in rewards]


def test_grpo_scales_by_group_and_reinforce_plus_plus_over_the_batch(make_policy):
    trainer, R, batch = prepared(make_policy(), GRPO)
    for rewards, group in zip(R.tolist(), trainer.advantage(R, batch).tolist()):
        assert group == pytest.approx(deviations(rewards), rel=1e-4)
    trainer, R, batch = prepared(make_policy(), ReinforcePlusPlus)
    assert trainer.advantage(R, batch).flatten().tolist() == pytest.approx(deviations(R.flatten().tolist(), 1), rel=1e-4)


def test_dapo_drops_groups_without_spread_and_taxes_length(make_policy):
    trainer, R, batch = prepared(make_policy(), DAPO, gamma=3.0)
    rollouts = batch.rollouts
    R[1] = 0.7  # and equal lengths: a group without spread
    rollouts.mask[:] = torch.arange(rollouts.mask.shape[2]) < torch.randint(1, 7, (*R.shape, 1))
    rollouts.mask[1] = rollouts.mask[1, :1]
    rollouts.finished[:] = True
    rollouts.finished[0, 0] = False
    R[0, 0] -= 3.0  # what judge took for not ending
    A, limit, N = trainer.advantage(R, batch), 6, len(R)
    for n, group in enumerate(R.tolist()):
        lengths = rollouts.mask[n].sum(-1).tolist()
        taxed = [r - min(max((length - 0.8 * limit) / (0.2 * limit), 0), 1) for r, length in zip(group, lengths)]
        taxed[0] += 3.0 if n == 0 else 0
        expected = [0.0] * len(group) if n == 1 else [x * N / (N - 1) for x in deviations(taxed)]
        assert A[n].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_dapo_clips_higher_and_weighs_every_token_alike(make_policy):
    trainer, R, batch = prepared(make_policy(), DAPO)
    A, rollouts = trainer.advantage(R, batch), batch.rollouts
    new = rollouts.logprobs + 0.4 * torch.randn(rollouts.logprobs.shape, generator=torch.Generator().manual_seed(3))
    surrogate, clipped = trainer.surrogate(new, rollouts, A), [0, 0]
    lengths = rollouts.mask.sum(-1)
    for n, k in ((n, k) for n in range(R.shape[0]) for k in range(R.shape[1])):
        total = 0.0
        for t in range(int(lengths[n, k])):
            ratio, a = math.exp(float(new[n, k, t] - rollouts.logprobs[n, k, t])), float(A[n, k])
            total += min(ratio * a, min(max(ratio, 0.8), 1.28) * a)
            clipped = [clipped[0] + (ratio < 0.8), clipped[1] + (1.2 < ratio < 1.28)]
        assert float(surrogate[n, k]) == pytest.approx(total / float(lengths.float().mean()), rel=1e-4, abs=1e-6)
    assert min(clipped) > 0  # both sides are at work, and so is the difference between them


def test_remax_subtracts_the_greedy_rationales_reward(make_policy):
    """That reward in loops: InfoNCE, consistency, and InfoNCE against the nearest rollouts."""
    policy = make_policy(double=True)
    trainer, R, batch = prepared(policy, ReMax, infonce_temperature=0.3)
    c, B = trainer.config, len(ROWS)
    baseline = R - trainer.advantage(R, batch)
    q, p, n = (batch.embeddings[role].tolist() for role in ("query", "positive", "negative"))
    dot = lambda a, b: sum(x * y for x, y in zip(a, b))
    mean = lambda values: sum(values) / len(values)
    expected = []
    for role, mine, other in (("query", q, p), ("positive", p, q)):
        for i, text in enumerate(batch.texts[role]):
            greedy = sample(policy, policy.template([text]), 1, 0.0)
            h, reward = greedy.embeddings[0, 0].tolist(), 0.0
            own = mean([dot(h, x) for x in other[i]])
            for reduce, weight in ((mean, 1.0), (max, c.lambda_hard)):
                scores = [own if j == i else reduce([dot(h, x) for x in other[j]]) for j in range(B)]
                scores += [reduce([dot(h, x) for x in group]) for group in n[i]] if role == "query" else []
                top = math.log(sum(math.exp(s / c.infonce_temperature) for s in scores))
                reward += weight * (own / c.infonce_temperature - top)
            reward += c.lambda_consistency * mean([dot(h, x) for x in mine[i]])
            expected.append(reward / c.tau - (0.0 if bool(greedy.finished) else c.gamma))
    for row, want in zip(baseline.tolist(), expected):
        assert row == pytest.approx([want] * len(row), abs=1e-5)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_takes_its_steps(make_policy, name):
    trainer = ALGORITHMS[name](make_policy(), None, ROWS, config(pathwise=0.0, kl=0.0, minibatches=2))
    before = trainer.policy.head.weight.clone()
    assert all(math.isfinite(value) for value in trainer.step().values())
    assert not torch.equal(before, trainer.policy.head.weight)


def test_what_an_algorithm_cannot_do_is_refused(make_policy, monkeypatch):
    with pytest.raises(GraceError, match="not with --reward paper"):
        DAPO(make_policy(), None, ROWS, config(recipe="paper"))
    for settings, policy in ((dict(mode="unsupervised"), make_policy()), ({}, make_policy(documents="prompt"))):
        with pytest.raises(GraceError, match="greedy rationale of each query and positive"):
            ReMax(policy, None, ROWS, config(**settings))
    monkeypatch.setattr("plumbing.ranks.size", 2)
    with pytest.raises(GraceError, match="leave out torchrun"):
        Contrastive(make_policy(), None, ROWS, config())


# ---------------------------------------------------------------- baselines


@pytest.mark.parametrize("pathwise", [0.0, 0.3])
def test_without_grpo_only_the_pathwise_term_has_a_gradient(make_policy, pathwise):
    trainer = PathwiseAlone(make_policy(), None, ROWS, config(pathwise=pathwise, kl=0.0, text_weight=0.0))
    assert (trainer.step()["grad_norm"] > 0) == (pathwise > 0)


@pytest.mark.parametrize("text_weight, twice", [(0.0, False), (2.0, False), (2.0, True)])
def test_the_contrastive_loss_and_its_gradient(make_policy, text_weight, twice):
    policy = make_policy(double=True, max_position_embeddings=256).reads(twice=twice)
    trainer, batch = Contrastive(policy, None, ROWS, config(text_weight=text_weight, infonce_temperature=0.3)), make_batch(ROWS)
    by_role = {role: [embedded(policy, text) for text in batch.texts[role]] for role in batch.texts}
    terms = infonce_terms(*([h for h, _ in by_role[role]] for role in ("query", "positive", "negative")), 0.3)
    text_logprobs = torch.stack([logprob for texts in by_role.values() for _, logprob in texts])
    expected, loss = -terms.mean() - text_weight * text_logprobs.mean(), trainer.loss(batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    weight = policy.model.model.layers[0].mlp.down_proj.weight
    mine, theirs = (torch.autograd.grad(x, weight)[0] for x in (loss, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-8)  # norms and rotations are float32 inside


def simcse(policy):
    return SimCSE(policy, None, [{"text": t} for t in TEXTS], config(mode="unsupervised", batch=2, text_weight=0.0))


def test_simcse_drops_out_in_its_views_alone(make_policy):
    policy = make_policy(double=True)
    trainer = simcse(policy)
    views, embed = [], trainer.embed
    trainer.embed = lambda texts, share: views.append(embed(texts, share)) or views[-1]
    loss = trainer.loss(make_batch([{"text": t} for t in TEXTS]))
    (one, _), (two, _) = views
    scores = (one @ two.T) / trainer.config.infonce_temperature
    assert loss.item() == pytest.approx((-(scores.diagonal() - scores.exp().sum(1).log()).mean()).item(), rel=1e-9)
    plain = torch.stack([embedded(policy, text)[0] for text in TEXTS])
    assert (one - two).abs().max() > 1e-3 and (one - plain).abs().max() > 1e-3
    torch.testing.assert_close(embed(TEXTS)[0], plain)  # the hook is gone


def test_what_simcse_drops_is_a_function_of_seed_step_and_view(make_policy):
    policy = make_policy()
    trainer, inputs = simcse(policy), policy.model.get_input_embeddings()
    inputs.weight.data.fill_(0.9)
    trainer.embed = lambda texts, share: inputs(torch.arange(120))
    first = trainer.view(TEXTS, 0)
    assert first.unique().tolist() == pytest.approx([0.0, 1.0]) and 0.08 < (first == 0).float().mean() < 0.12
    assert torch.equal(first, trainer.view(TEXTS, 0)) and not torch.equal(first, trainer.view(TEXTS, 1))
    trainer.step_number = 1
    assert not torch.equal(first, trainer.view(TEXTS, 0))


def test_what_is_forced_is_the_starts_longest_of_eight_that_ended(make_policy):
    policy = make_policy()
    drawn, forced = rolled(policy, K=8, seed=[0, 0, 5]), longest(policy, TEXTS, [0, 0, 5])
    assert drawn.finished.any(1).all() and not drawn.finished.all()  # so that ending matters
    for n, rationale in enumerate(forced.rationales()):
        ended = [r for r, finished in zip(drawn.rationales()[n], drawn.finished[n]) if finished]
        assert rationale == [max(ended, key=len)] and forced.finished[n]
    assert torch.allclose(forced.embeddings[0, 0], by_full_forward(policy, forced, 0, 0)[1], atol=1e-5)
    trainer = ForcedContrastive(policy, start(policy), ROWS, config(lr=1e-2, steps=3))
    torch.testing.assert_close(trainer.embed(TEXTS)[0], forced.embeddings[:, 0])
    trainer.step()
    assert torch.equal(longest(trainer.start, TEXTS, [0, 0, 5]).ids, forced.ids)  # the policy moved, its start did not
    assert not torch.equal(longest(policy, TEXTS, [0, 0, 5]).ids, forced.ids)


# ---------------------------------------------------------------- measurements


class World:
    """What `measure` needs of a world whose warm start taught a second instruction, with given answers to it."""

    other_instruction = "say where"

    def __init__(self, answers):
        self.answers = answers

    def named(self, rationale, text):
        return (0.5, 1.0) if text == TEXTS[0] else (0.0, 0.25)

    def well_formed(self, rationale):
        return isinstance(rationale, str)

    def other_chats(self, n, rng):
        return list(zip(TEXTS, self.answers))


def test_the_starts_answers_as_the_policy_finds_them(make_policy):
    """By the library's own model, a rollout at a time; the mean is over tokens, not over answers."""
    start, policy = make_policy(), make_policy(seed=1)
    drawn = rolled(start, K=1, seed=[0, 0])
    logprobs = torch.cat([by_full_forward(policy, drawn, n, 0)[0] for n in range(len(TEXTS))])
    assert len(set(drawn.mask.sum(-1).flatten().tolist())) > 1  # or the two means would be one
    assert answers_loss(start, policy, TEXTS) == pytest.approx(-logprobs.mean().item(), rel=1e-5)
    assert answers_loss(start, policy, TEXTS) > answers_loss(start, start, TEXTS)  # their difference is a KL


def test_another_instruction_is_followed_or_not(make_policy):
    policy = make_policy(max_new_tokens=5)
    other = policy.__class__(policy.model, policy.tokenizer, dataclasses.replace(policy.reading, instruction="say where"))
    written = rolled(other, K=1, temperature=0).rationales()
    greedy = [policy.tokenizer.decode(ids[0], skip_special_tokens=True) for ids in written]
    answers = [greedy[0], "the old lamp", "boat"]
    nats, tokens = 0.0, 0
    for text, answer in zip(TEXTS, answers):
        prompt = other.template([text]).ids[0].tolist()
        ids = policy.tokenizer(answer)["input_ids"] + [policy.end_ids[0].item()]
        logits = policy.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        nats -= torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None]).sum().item()
        tokens += len(ids)
    stats = follow_other(policy, World(answers), 3)
    assert stats["other_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert stats["other_right"] == pytest.approx(sum(a == b for a, b in zip(greedy, answers)) / 3) != 0
    measured = measure(policy, policy, TEXTS, World(answers))
    assert stats.items() <= measured.items() and measured["recall"] == pytest.approx(0.5 / 3)


# ---------------------------------------------------------------- records and the page


def test_every_table_has_its_records_and_every_record_a_table():
    wanted = {frozenset(one.items()) for table in TABLES.values() for _, one in table.runs()}
    assert records.read(records.RESULTS).keys() == wanted


def test_the_page_is_what_the_records_make_it():
    with open("docs/results.md") as file:
        text = file.read()
    known = records.read(records.RESULTS)
    blocks = {name: page.block(name, table, run.rows_of(name, known)) for name, table in TABLES.items()}
    assert page.replaced(text, {name: block for name, block in blocks.items() if block}) == text


def test_tables_are_made_once(tmp_path, monkeypatch, capsys):
    """Runs of many kinds in one step each, in small worlds, their tables and pictures; a second call trains nothing."""
    pytest.importorskip("matplotlib", reason="the pictures need the extra `plot`")
    brief = dict(batch=4, rollouts=3, steps=1, eval_every=0, max_new_tokens=6)
    tables = {}
    for name in ("ladder", "table2"):
        rows = {label: one | brief for label, one in TABLES[name].rows.items()}
        tables[name] = dataclasses.replace(TABLES[name], rows=rows, seeds=(0,))
    monkeypatch.setattr(run, "TABLES", tables)
    monkeypatch.setattr(records, "ROOT", str(tmp_path))
    monkeypatch.setattr(records, "build_world", functools.partial(build_world, train=64, heldout=8, steps=2))
    command = ["all", "--jobs", "1", "--out", str(tmp_path)]
    run.main(command)
    assert capsys.readouterr().out.count(" s  world=") == len((tmp_path / "results.jsonl").read_text().splitlines())
    text = (tmp_path / "results.md").read_text()
    assert "| SimCSE |" in text and "| steps in each walk | 1 |" in text and "nan" not in text
    assert (tmp_path / "ladder.png").stat().st_size > 10_000
    run.main(command)
    assert " s  world=" not in capsys.readouterr().out and (tmp_path / "results.md").read_text() == text


def test_the_towns_settings_are_those_of_train_sh():
    with open("train.sh") as file:
        script = file.read()
    town_line = re.search(r"^  town\)\n.*\n    settings=\((.*)\)", script, flags=re.M)[1]
    for_all = re.search(r"grace\.py .*(--batch.*?) \"\$\{settings", script)[1]
    assert parse(shlex.split(f"{town_line} {for_all}"), "") == records.config_of(WALK)


# ---------------------------------------------------------------- real text


def test_what_a_rationale_names():
    rows = [
        {"word": "box", "query": "a case of wood", "positive": "a container with lids"},
        {"word": "lamp", "query": "it gives light", "positive": "burns oil"},
    ]
    written = [("Boxes, a wooden case", "a lid"), ("a lamps", "the lights")]
    found = real.describe(rows, written)
    assert found["named"] == 2 / 4  # boxes, lamps
    assert found["true"] == pytest.approx(3 / 6)  # case, lid, lights; not boxes, wooden, lamps
    assert not real.names("the glass", "glas s") and real.names("GLASSES.", "glass")


def test_ranks():
    queries, positives = torch.eye(3)[:2].numpy(), torch.tensor([[0.5, 0, 0], [0.6, 0, 0], [0.5, 0.5, 0]]).numpy()
    assert real.ranks(queries, positives).tolist() == [2, 2]  # a tie with the third does not count
    assert real.ranks(queries[:, None].repeat(2, 1), positives).tolist() == [[2, 2], [2, 2]]


def test_headroom_is_that_of_what_is_drawn(make_policy):
    """Ten queries, so that two parts are drawn, each against its own positive among all ten."""
    policy, words = make_policy(), "old young tall rich quiet smart happy angry boat lamp".split()
    rows = [{"query": f"{TEXTS[i % 3]} {word}", "word": word} for i, word in enumerate(words)]
    positives = torch.nn.functional.normalize(torch.randn(10, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    found, mean, best, named = real.headroom(policy, rows, positives.numpy(), 1.0, K=4), 0.0, 0.0, 0
    for first in (0, 8):
        part = rows[first : first + 8]
        drawn = rolled(policy, [row["query"] for row in part], K=4, seed=[0, first])
        for i, row in enumerate(part):
            scores = drawn.embeddings[i] @ positives.T
            values = [1 / (1 + sum(x > line[first + i] for x in line)).item() for line in scores]
            mean, best = mean + sum(values) / 40, best + max(values) / 10
            named += any(row["word"] in policy.tokenizer.decode(ids).split() for ids in drawn.rationales()[i])
    assert found["mean_of_16"] == pytest.approx(mean) and found["best_of_16"] == pytest.approx(best)
    assert best > mean and found["any_of_16_names"] == named / 10


def made_up(folder):
    """Files as real.py reads them, in the words of the tiny tokenizer: a folder of data."""
    things = [
        f"the {a} {b}" for a in "old young tall rich quiet smart".split() for b in "doctor child boat lamp sofa street".split()
    ]
    words = [text.split()[-1] for text in things]
    pairs = [{"word": w, "pos": "noun", "query": f"{t} sold", "positive": f"somebody found {t}"} for w, t in zip(words, things)]
    write_rows(folder / "dictionary" / "train.jsonl", pairs[:16])
    write_rows(folder / "dictionary" / "validation.jsonl", pairs[16:])
    write_rows(
        folder / "dictionary" / "start.jsonl", [{"word": w, "pos": "noun", "definition": t} for w, t in zip(words, things)]
    )
    pictures = [{"id": t, "captions": [f"{t} sold", f"somebody hid {t}", f"{t} fixed"]} for t in things]
    for name, part in (("flickr30k_train", pictures[:8]), ("coco", pictures[8:16]), ("flickr30k_heldout", pictures[16:])):
        write_rows(folder / "captions" / f"{name}.jsonl", part)
    graded = [{"sentence1": one, "sentence2": two, "score": i % 5} for i, (one, two) in enumerate(zip(things, things[7:]))]
    for task in ("STSBenchmark", "SICK-R"):
        write_rows(folder / "eval" / task / "test.jsonl", graded)
    return folder


def test_real_text_from_rows_to_page(make_policy, tmp_path, monkeypatch, capsys):
    """The start, a loss, GRACE from that start and a try, in two steps each, and the page of their records."""
    make_policy().save(tmp_path / "model")
    data = made_up(tmp_path / "data")
    monkeypatch.setattr(real, "RESULTS", str(tmp_path / "real.jsonl"))
    monkeypatch.setattr(real, "PAGE", str(tmp_path / "page.md"))
    monkeypatch.setattr(real, "TASKS", ("STSBenchmark", "SICK-R"))
    brief = dict(batch=4, max_prompt_tokens=64, max_new_tokens=6, pairs=9)
    monkeypatch.setattr(real, "english", functools.partial(real.english, train=40, heldout=12))
    for name, one in real.RUNS.items():
        monkeypatch.setitem(real.RUNS, name, one | brief | {k: 2 for k in ("steps", "rollouts") if k in one})
    few = real.heldout_rows  # the made-up files have as many rows as are for choosing
    monkeypatch.setattr(real, "heldout_rows", lambda *given: dict.fromkeys(("choose", "table"), few(*given)["choose"]))
    given = ["--model", str(tmp_path / "model"), "--data-dir", str(data), "--out", str(tmp_path / "out")]
    runs = ["start", "words-untrained", "words-grace", "captions-loss-twice", "captions-simcse", "events-loss"]
    for name in runs:
        real.main([name, *given])
    real.main(["captions-loss", "--part", "choose", "--lr", "1e-3", *given])
    made = {record["name"]: record for record in records.read(real.RESULTS).values()}
    assert list(made) == [*runs, "captions-loss"] and made["captions-loss"]["run"]["lr"] == 1e-3
    words = made["words-grace"]
    assert words["before"]["text_loss"] == made["words-untrained"]["after"]["text_loss"] == made["start"]["after"]["text_loss"]
    assert len(words["written"]) == 12 and {"named", "any_of_16_names"} <= words["after"].keys()
    for name, (way, (twice, rationale)) in itertools.product(("words-grace", "events-loss"), real.WAYS.items()):
        policy = real.Policy.load(str(tmp_path / "out" / f"{name}-seed-0"), twice=twice)
        rows = [{"negative": [], **row} for row in real.heldout_rows(made[name]["run"], data)["table"]]
        rows = [row | {"negative": [row["negative"]] if row["negative"] else []} for row in rows]
        score = evaluate_triplets(policy, rows, rationale=rationale)["ndcg_at_10"]
        assert made[name]["after"]["ways"][way]["ndcg_at_10"] == pytest.approx(score, rel=1e-4)
    (tmp_path / "page.md").write_text("before\n<!-- real --><!-- /real -->\nafter\n")
    real.main(["page"])
    text = (tmp_path / "page.md").read_text()
    assert "### Words" in text and "| GRACE, full |" in text and "| captions-loss | lr 0.001 |" in text and "nan" not in text
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    real.main([])
    assert "words-grace              1 seeds" in capsys.readouterr().out
    with pytest.raises(GraceError, match="no such file; --data-dir names the folder"):
        real.main(["captions-loss", "--data-dir", str(tmp_path)])


def test_the_supervised_start_learns_its_words(make_policy):
    rows = [{"query": text, "positive": word, "negative": []} for text, word in zip(TEXTS, ("lamp", "boat", "sofa"))] * 2
    policy = make_policy()
    trainer = real.Start(policy, None, rows, config(steps=40, lr=3e-3, batch=6))
    losses = [trainer.step()["loss"] for _ in range(40)]
    assert losses[-1] < 0.1 * losses[0]
    greedy = sample(policy, policy.template(TEXTS)).rationales()
    assert [policy.tokenizer.decode(ids[0], skip_special_tokens=True) for ids in greedy] == ["lamp", "boat", "sofa"]
    trainer.config.batch, batches = 2, set()
    for trainer.step_number in range(20):
        batches.add(tuple(row["positive"] for row in trainer.next_rows()))
    by_length = ["boat", "boat", "lamp", "lamp", "sofa", "sofa"]
    assert batches == set(zip(by_length, by_length[1:]))
