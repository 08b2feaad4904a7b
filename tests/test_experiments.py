"""Experiments and benchmarks: algorithms and baselines against loops, verdicts, records, pictures, and a smoke run of each."""

import dataclasses
import itertools
import math
import multiprocessing
import os
import re
import runpy
import shlex

import pictures
import pytest
import run
import torch
from algorithms import ALGORITHMS, DAPO, GRPO, DrGRPO, ReinforcePlusPlus, ReMax
from baselines import Contrastive, ForcedContrastive, PathwiseAlone, SimCSE, longest
from conftest import ROWS, TEXTS, by_full_forward, config, embedded, infonce_terms, rolled
from page import COLUMNS, Claim, table, whole_page
from record import Place, answers_logprob, bare_loss, follow_other, measure, read_records, rounded, write_record
from scores import value
from synthetic_tasks import write_all
from tables import EXPERIMENTS, REAL
from town import WALKING

import grace
from config import Config, parse, setting
from evaluation.encoder import text_loss
from plumbing.errors import GraceError
from rollout import make_batch, roll_out, sample
from worlds import WORLDS

# ---------------------------------------------------------------- algorithms


def prepared(policy, algorithm, **settings):
    """A trainer of an algorithm, rewards, and the batch as its `advantage` gets it."""
    trainer = algorithm(policy, None, ROWS, config(**settings))
    batch = make_batch(ROWS)
    batch.rollouts, batch.embeddings, *_ = roll_out(policy, batch.texts, trainer.config, 0, trainer.sample_tokens)
    R = torch.randn(batch.rollouts.finished.shape, generator=torch.Generator().manual_seed(2))
    return trainer, R, batch


def test_grpo_divides_by_the_groups_deviation(make_policy):
    trainer, R, batch = prepared(make_policy(), GRPO)
    A = trainer.advantage(R, batch)
    for rewards, group in zip(R.tolist(), A.tolist()):
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
        assert group == pytest.approx([(r - mean) / std for r in rewards], rel=1e-4)


def test_reinforce_plus_plus_scales_over_the_whole_batch(make_policy):
    trainer, R, batch = prepared(make_policy(), ReinforcePlusPlus)
    flat = R.flatten().tolist()
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((r - mean) ** 2 for r in flat) / (len(flat) - 1))
    expected = [(r - mean) / std for r in flat]
    assert trainer.advantage(R, batch).flatten().tolist() == pytest.approx(expected, rel=1e-4)


def test_dapo_drops_groups_without_spread_and_taxes_length(make_policy):
    trainer, R, batch = prepared(make_policy(), DAPO, gamma=3.0)
    rollouts = batch.rollouts
    R[1] = 0.7  # and equal lengths: a group without spread
    rollouts.mask[:] = torch.arange(rollouts.mask.shape[2]) < torch.randint(1, 7, (*R.shape, 1))
    rollouts.mask[1] = rollouts.mask[1, :1]
    rollouts.finished[:] = True
    rollouts.finished[0, 0] = False
    R[0, 0] -= 3.0  # what judge took for not ending
    A, limit = trainer.advantage(R, batch), 6
    for n, group in enumerate(R.tolist()):
        lengths = rollouts.mask[n].sum(-1).tolist()
        taxed = [r - min(max((length - 0.8 * limit) / (0.2 * limit), 0), 1) for r, length in zip(group, lengths)]
        taxed[0] += 3.0 if n == 0 else 0
        mean = sum(taxed) / len(taxed)
        std = math.sqrt(sum((r - mean) ** 2 for r in taxed) / len(taxed))
        N = len(R)
        expected = [0.0] * len(group) if n == 1 else [(r - mean) / std * N / (N - 1) for r in taxed]
        assert A[n].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("algorithm, low, high", [(DAPO, 0.2, 0.28), (DrGRPO, 0.2, 0.2)])
def test_the_other_surrogates_token_by_token(make_policy, algorithm, low, high):
    trainer, R, batch = prepared(make_policy(), algorithm)
    A, rollouts = trainer.advantage(R, batch), batch.rollouts
    new = rollouts.logprobs + 0.4 * torch.randn(rollouts.logprobs.shape, generator=torch.Generator().manual_seed(3))
    surrogate, clipped = trainer.surrogate(new, rollouts, A), [0, 0]
    lengths = rollouts.mask.sum(-1)
    scale = float(lengths.float().mean()) if algorithm is DAPO else trainer.policy.reading.max_new_tokens
    for n in range(R.shape[0]):
        for k in range(R.shape[1]):
            total = 0.0
            for t in range(int(lengths[n, k])):
                ratio, a = math.exp(float(new[n, k, t] - rollouts.logprobs[n, k, t])), float(A[n, k])
                total += min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
                clipped = [clipped[0] + (ratio < 1 - low), clipped[1] + (1 + low < ratio < 1.28)]
            assert float(surrogate[n, k]) == pytest.approx(total / scale, rel=1e-4, abs=1e-6)
    assert min(clipped) > 0  # both sides are at work, and so is the difference between them


def test_what_an_algorithm_cannot_do_is_said(make_policy, monkeypatch):
    with pytest.raises(GraceError, match="--relative-length-penalty"):
        DAPO(make_policy(), None, ROWS, config(relative_length_penalty=False))
    with pytest.raises(GraceError, match="labelled rows"):
        ReMax(make_policy(), None, ROWS, config(mode="unsupervised"))
    monkeypatch.setattr("plumbing.ranks._size", 2)
    with pytest.raises(GraceError, match="leave out torchrun"):
        Contrastive(make_policy(), None, ROWS, config())


def test_remax_subtracts_the_greedy_rationales_reward(make_policy):
    """That reward in loops: InfoNCE, consistency, and InfoNCE against the nearest rollouts."""
    policy = make_policy().__class__(make_policy().model.double(), make_policy().tokenizer, make_policy().reading)
    trainer, R, batch = prepared(policy, ReMax, infonce_temperature=0.3)
    c, B = trainer.config, len(ROWS)
    baseline = R - trainer.advantage(R, batch)
    q, p, n = (batch.embeddings[role].tolist() for role in ("query", "positive", "negative"))
    dot = lambda a, b: sum(x * y for x, y in zip(a, b))
    mean = lambda values: sum(values) / len(values)
    expected = []
    for role, mine, other in (("query", q, p), ("positive", p, q)):
        for i, text in enumerate(batch.texts[role]):
            greedy = sample(policy, policy.prompts([text]), 1, 0.0)
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


# ---------------------------------------------------------------- baselines


@pytest.mark.parametrize("pathwise, moved", [(0.0, False), (0.3, True)])
def test_without_grpo_only_the_pathwise_term_moves_the_policy(make_policy, pathwise, moved):
    trainer = PathwiseAlone(make_policy(), None, ROWS, config(pathwise=pathwise, kl=0.0, text_weight=0.0, weight_decay=0.0))
    before = [p.clone() for p in trainer.policy.model.parameters()]
    assert (trainer.step()["grad_norm"] > 0) == moved
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.policy.model.parameters())) == moved


@pytest.mark.parametrize("baseline", [Contrastive, SimCSE])
def test_a_baseline_stops_at_a_gradient_that_is_not_finite(make_policy, baseline):
    rows = ROWS if baseline is Contrastive else [{"text": row["query"]} for row in ROWS]
    trainer = baseline(make_policy(), None, rows, config(mode="supervised" if baseline is Contrastive else "unsupervised"))
    trainer.loss = lambda batch: next(trainer.policy.model.parameters()).sum() * math.nan
    before = [p.clone() for p in trainer.policy.model.parameters()]
    with pytest.raises(GraceError, match="the gradient is not finite"):
        trainer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.model.parameters()))


@pytest.mark.parametrize("text_weight", [0.0, 2.0])
def test_the_contrastive_loss_and_its_gradient(make_policy, text_weight):
    policy = make_policy(double=True)
    trainer = Contrastive(policy, None, ROWS, config(text_weight=text_weight, infonce_temperature=0.3))
    batch = make_batch(ROWS)
    by_role = {role: [embedded(policy, text) for text in batch.texts[role]] for role in batch.texts}
    terms = infonce_terms(*([h for h, _ in by_role[role]] for role in ("query", "positive", "negative")), 0.3)
    text_logprobs = torch.stack([logprob for texts in by_role.values() for _, logprob in texts])
    expected = -terms.mean() - text_weight * text_logprobs.mean()
    loss = trainer.loss(batch)
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
    kept = lambda view: trainer.view(TEXTS, view)
    first = kept(0)
    assert first.unique().tolist() == pytest.approx([0.0, 1.0]) and 0.08 < (first == 0).float().mean() < 0.12
    assert torch.equal(first, kept(0)) and not torch.equal(first, kept(1))
    trainer.step_number = 1
    assert not torch.equal(first, kept(0))


@pytest.mark.parametrize("trainer", [Contrastive, ForcedContrastive, SimCSE])
def test_a_loss_falls(make_policy, trainer):
    rows = [{"text": row["query"]} for row in ROWS] if trainer is SimCSE else ROWS
    mode = "unsupervised" if trainer is SimCSE else "supervised"
    trained = trainer(make_policy(), None, rows, config(mode=mode, lr_decay=True, steps=30, lr=1e-3))
    losses = [trained.step()["loss"] for _ in range(30)]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert trained.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 30)


def test_what_is_forced_is_the_longest_of_eight_that_ended(make_policy):
    policy = make_policy()
    drawn, forced = rolled(policy, K=8, seed=7), longest(policy, TEXTS, 7)
    assert drawn.finished.any(1).all() and not drawn.finished.all()  # so that ending matters
    for n, rationale in enumerate(forced.rationales()):
        ended = [r for r, finished in zip(drawn.rationales()[n], drawn.finished[n]) if finished]
        assert rationale == [max(ended, key=len)] and forced.finished[n]
    _, embedding = by_full_forward(policy, forced, 0, 0)
    assert torch.allclose(forced.embeddings[0, 0], embedding, atol=1e-5)


def test_forced_rationales_are_the_starts_and_not_the_policys(make_policy):
    trainer = ForcedContrastive(make_policy(), None, ROWS, config(lr=1e-2, steps=3))
    before = longest(trainer.start, TEXTS, 0).ids
    for _ in range(3):
        trainer.step()
    assert torch.equal(longest(trainer.start, TEXTS, 0).ids, before)
    assert not torch.equal(longest(trainer.policy, TEXTS, 0).ids, before)


# ---------------------------------------------------------------- claims, records, the runner


def test_verdicts_are_counted():
    row = lambda *recalls: [{"run": {"seed": seed}, "after": {"recall": recall}} for seed, recall in enumerate(recalls)]
    by_label = {"a": row(0.9, 0.8), "b": row(0.5, 0.85), "c": row(0.1, 0.2)}
    verdict = lambda *pairs, **more: Claim("", list(pairs), "recall", **more).verdict(by_label)
    assert verdict(("a", "c")) == "**agrees** (2 of 2 comparisons)"
    assert verdict(("c", "a"), ("c", "b")) == "**disagrees** (0 of 4 comparisons)"
    assert verdict(("a", "b")) == "**cannot be seen at this size** (1 of 2 comparisons)"
    assert verdict(("a", "a"), within=0.1) == "**agrees** (2 of 2 comparisons)"
    assert verdict(("a", "c"), within=0.1) == "**disagrees** (0 of 2 comparisons)"
    assert verdict(("a", "b"), by=0.4) == "**disagrees** (0 of 2 comparisons)"
    by_label |= {"late": row(0, 0.7)[1:], "start": row(0.75)[:1] * 2}  # the second seed alone; one record for every seed
    assert verdict(("a", "late")) == "**agrees** (1 of 1 comparison)" == verdict(("start", "late"))
    by_label["lower"] = row(0.7)[:1] * 2
    assert verdict(("start", "lower")) == "**agrees** (1 of 1 comparison)"  # two records are compared once
    assert verdict(("start", "b")) == "**cannot be seen at this size** (1 of 2 comparisons)"
    assert verdict(("a", "nobody")) == "not measured yet"


def both_ways(*scores):
    """A record per seed, from pairs: nDCG@10 with the rationale, and by the prompt alone."""
    moments = ("after", "after_without_rationale")
    row = [{moment: {"ndcg_at_10": score} for moment, score in zip(moments, pair)} for pair in scores]
    return [record | {"run": {"seed": seed}} for seed, record in enumerate(row)]


def test_claims_compare_the_better_way_of_each_row():
    by_label = {
        "SimCSE": both_ways((0.9, 0.6), (0.7, 0.75)),  # better with rationale by the mean, so in both of its seeds
        "GRACE": both_ways((0.2, 0.8), (0.1, 0.72)),
        "Base": both_ways((0.95, 0.1), (0.95, 0.1)),  # each of these two is one way alone
        "Base with reasoning": both_ways((0.3, 0.99), (0.3, 0.99)),
    }
    verdict = lambda *pair: Claim("", [pair]).verdict(by_label)
    assert verdict("GRACE", "SimCSE") == "**cannot be seen at this size** (1 of 2 comparisons)"
    assert verdict("GRACE", "Base") == verdict("GRACE", "Base with reasoning") == "**agrees** (2 of 2 comparisons)"
    assert verdict("Base with reasoning", "Base") == "**agrees** (2 of 2 comparisons)"
    assert Claim("", [("GRACE", "SimCSE")], "spearman").verdict(by_label) == "not measured on these data"


def test_tables_show_both_ways_of_every_trained_row():
    by_label = {"Base": both_ways((0.5, 0.1)), "SimCSE": both_ways((0.9, 0.6)), "GRACE": both_ways((0.2, 0.7))}
    assert table(by_label, ["ndcg_at_10", "spearman"]) == [
        "| | nDCG@10, with rationale | nDCG@10, prompt alone |",
        "| --- | ---: | ---: |",
        "| Base |  | 0.100 |",
        "| SimCSE | **0.900** | 0.600 |",
        "| GRACE | 0.200 | **0.700** |",
    ]


def test_a_figure_that_was_not_measured_is_a_dash_and_judges_nothing():
    new = {"before": {"answers_loss": 1.0, "text_loss": 2.0}, "after": {"answers_loss": 1.25, "text_loss": 2.5}}
    old = {moment: {"text_loss": loss["text_loss"]} for moment, loss in new.items()}
    assert value(new, "answers loss") == 0.25 and value(old, "answers loss") is None
    by_label = {
        label: [x | {"run": {"seed": i}} for i, x in enumerate(row)]
        for label, row in (("new", [new, new]), ("old", [new, old]))
    }
    assert [line.split("|")[2:] for line in table(by_label, ["text loss", "answers loss", "plain loss"])[2:]] == [
        [" 0.50 ", " 0.25 ", ""],
        [" 0.50 ", " – ", ""],
    ]
    assert Claim("", [("new", "old")], "answers loss").verdict(by_label) == "not measured on these data"


def test_claims_name_rows_and_columns_that_exist():
    for experiment in EXPERIMENTS.values():
        named = {label for claim in experiment.claims for pair in claim.pairs for label in pair}
        assert named <= set(experiment.rows)
        assert {*experiment.columns, *(claim.column for claim in experiment.claims)} <= COLUMNS.keys()


def test_a_run_is_found_by_its_settings():
    place = Place()
    base = dict(trainer="GRACE", recipe="full", seed=0)
    assert place.key(base) == place.key({**base, "clip_eps": 0.2, "world": None})  # a default is no difference
    assert place.key(base) == place.key(base | dict(tokens_per_batch=7, device="cpu"))  # nor is where it fits
    others = [dict(seed=1), dict(steps=7), dict(trainer="GRPO"), dict(recipe="paper"), dict(world="meals"), dict(probe="tasks")]
    assert len({place.key(base), *(place.key(base | other) for other in others)}) == 7
    assert place.key(base) != Place(quick=True).key(base) != Place(data="x").key(base)


def test_a_record_is_of_the_files_that_it_was_made_from(tmp_path):
    run, path = dict(trainer="none", seed=0, backbone="given", probe="captions"), tmp_path / "rows.jsonl"
    path.write_text("one")
    place = Place(results=str(tmp_path / "results"), model="models/mine", data=str(path), heldout="hub/name")
    place.write(run, {"backbone": "mine", "files": place.contents()})
    assert place.read(run) and dataclasses.replace(place, data=None, heldout=None).read(run)
    assert not dataclasses.replace(place, heldout="hub/other").read(run)
    assert not dataclasses.replace(place, model="models/other").read(run)
    path.write_text("two")
    assert not place.read(run)
    place.write(run, {"backbone": "mine"})  # an older record, which does not say
    assert place.read(run)


def test_a_setting_that_config_gains_later_leaves_every_key_as_it_is(monkeypatch):
    run, place = dict(trainer="GRACE", recipe="full", seed=0), Place()
    key = place.key(run)
    later = dataclasses.make_dataclass("Later", [("gain", float, setting(1.0, "a setting of next year"))], bases=(Config,))
    monkeypatch.setattr("record.Config", later)
    assert place.key(run) == place.key(run | dict(gain=1.0)) == key != place.key(run | dict(gain=2.0))


def test_a_record_is_kept_replaced_and_not_lost_to_a_torn_line(tmp_path):
    place, runs = Place(results=str(tmp_path / "results")), [dict(trainer="none", seed=seed) for seed in range(3)]
    for seed, one in enumerate(runs):
        place.write(one, {"backbone": "toy", "score": seed})
    place.write(runs[1], {"backbone": "toy", "score": 10})
    path = place.file(runs[0])
    lines = open(path).read().splitlines()
    assert len(lines) == 3 and lines == sorted(lines) and all(" " not in line for line in lines)
    assert [place.read(one)["score"] for one in runs] == [0, 10, 2]
    with open(path, "a") as file:
        file.write(lines[0][:20])  # as a full disk leaves it
    assert [place.read(one)["score"] for one in runs] == [0, 10, 2]
    place.write(runs[2], {"backbone": "toy", "score": 20})  # and the next record does not end up behind it
    assert [place.read(one)["score"] for one in runs] == [0, 10, 20]
    with open(path, "w") as file:
        file.write("\n".join(lines)[:-9])  # the last record itself is torn
    assert [place.read(one) for one in runs].count(None) == 1


def write_many(path, first):
    for number in range(first, 60, 3):
        write_record(path, f"none-{number}", {"number": number})


def test_processes_that_write_records_at_the_same_time_lose_none(tmp_path):
    path, context = str(tmp_path / "results" / "events.jsonl"), multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(path, first)) for first in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {key: record["number"] for key, record in read_records(path).items()} == {f"none-{n}": n for n in range(60)}
    assert os.listdir(tmp_path / "results") == ["events.jsonl"]


class Numbers:
    """A world without slots, with what `measure` needs of a world and no more."""

    def __init__(self):
        self.texts = []

    def named(self, rationale, text):
        self.texts.append(text)
        return (0.5, 1.0) if text == TEXTS[0] else (0.0, 0.25)

    def well_formed(self, rationale):
        return isinstance(rationale, str)


def test_what_rationales_name_is_for_the_world_to_judge(make_policy):
    policy, world = make_policy(), Numbers()
    stats = measure(policy, policy, TEXTS[:2], world, instructed=False)
    assert world.texts == TEXTS[:2]
    assert (stats["recall"], stats["precision"], stats["well_formed"]) == (0.25, 0.625, 1.0)
    assert measure(policy, policy, TEXTS[:2], None).keys() == {"distinct", "start_logprob", "answers_loss"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_policys_answers_as_another_finds_them(make_policy, temperature):
    """By the library's own model, a rollout at a time; the mean is over tokens, not over answers."""
    writer, reader = make_policy(), make_policy(seed=1)
    rollouts = rolled(writer, K=1, temperature=temperature, seed=[0, 0])
    logprobs = torch.cat([by_full_forward(reader, rollouts, n, 0)[0] for n in range(len(TEXTS))])
    assert len(set(rollouts.mask.sum(-1).flatten().tolist())) > 1  # or the two means would be one
    expected = pytest.approx(logprobs.mean().item(), rel=1e-5)
    assert answers_logprob(writer, reader, TEXTS, temperature) == expected
    stats = measure(reader, writer, TEXTS, None)
    assert -stats["answers_loss"] == (expected if temperature else pytest.approx(answers_logprob(writer, reader, TEXTS, 1.0)))
    if temperature:
        assert stats["answers_loss"] > measure(writer, writer, TEXTS, None)["answers_loss"]  # their difference is a KL


def test_texts_that_stand_alone_need_no_prompt(make_policy):
    """The library's own loss, text by text and weighted by tokens; the instruction does not reach it."""
    policy = make_policy()
    other = policy.__class__(
        make_policy().model, policy.tokenizer, dataclasses.replace(policy.reading, instruction="say where")
    )
    nats = count = 0
    for text in TEXTS:
        ids = policy.tokenizer(text, return_tensors="pt")["input_ids"]
        nats += policy.model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    expected = pytest.approx(nats / count, rel=1e-5)
    assert measure(policy, policy, TEXTS[:2], None, TEXTS)["bare_loss"] == expected == bare_loss(other, TEXTS)
    assert text_loss(policy, TEXTS) != text_loss(other, TEXTS)


class Other(Numbers):
    """A world whose warm start taught a second instruction, with given answers to it."""

    other_instruction = "say where"

    def __init__(self, answers):
        self.texts, self.answers = [], answers

    def other_chats(self, n, rng, held_out=True):
        assert held_out
        return list(zip(TEXTS, self.answers))


def test_another_instruction_is_followed_or_not(make_policy):
    policy = make_policy(max_new_tokens=5)
    reading = dataclasses.replace(policy.reading, instruction="say where")
    other = policy.__class__(make_policy(max_new_tokens=5).model, policy.tokenizer, reading)
    written = rolled(other, K=1, temperature=0).rationales()
    greedy = [policy.tokenizer.decode(ids[0], skip_special_tokens=True) for ids in written]
    answers = [greedy[0], "the old lamp", "boat"]
    nats, tokens = 0.0, 0
    for text, answer in zip(TEXTS, answers):
        prompt = other.prompts([text]).ids[0].tolist()
        ids = policy.tokenizer(answer)["input_ids"] + [policy.end_ids[0].item()]
        logits = policy.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        nats -= torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None]).sum().item()
        tokens += len(ids)
    stats = follow_other(policy, Other(answers), 3)
    assert stats["other_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert stats["other_right"] == pytest.approx(sum(a == b for a, b in zip(greedy, answers)) / 3) != 0
    assert stats.items() <= measure(policy, policy, TEXTS, Other(answers)).items()


def test_every_committed_record_is_read_by_a_table():
    place = Place()
    wanted = {(place.file(run), place.key(run)) for experiment in EXPERIMENTS.values() for _, run in experiment.runs()}
    names = [os.path.join(place.results, name) for name in os.listdir(place.results)]
    kept = {(name, key) for name in names for key in read_records(name)}
    whole = [experiment for experiment in EXPERIMENTS.values() if experiment.whole]  # the others come in row by row
    assert {(place.file(run), place.key(run)) for experiment in whole for _, run in experiment.runs()} <= kept <= wanted
    assert all(key == place.key(record["run"]) for name in names for key, record in read_records(name).items())


def test_rounding_keeps_integers_and_strings():
    assert rounded({"a": [1, 0.123456789, "x", None, True]}) == {"a": [1, 0.12346, "x", None, True]}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Every experiment once, one step a run, all in this process."""
    pytest.importorskip("matplotlib", reason="the pictures need the extra `plot`")
    out = tmp_path_factory.mktemp("experiments")
    run.main(["all", "--quick", "--jobs", "1", "--out", str(out)])
    return out


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in REAL])
def test_quick(quick, name):
    page = (quick / "results.md").read_text()
    assert f"## {EXPERIMENTS[name].title}\n" in page and f"run.py {name}`" in page and "nan" not in page
    if EXPERIMENTS[name].figure:
        assert (quick / f"{name}.png").stat().st_size > 10_000


def test_a_second_call_makes_no_run_and_the_same_page(quick, capsys):
    page, records = (quick / "results.md").read_text(), sorted(os.listdir(quick / "results"))
    assert records == sorted(f"{world}.jsonl" for world in WORLDS)
    times = [os.stat(quick / "results" / name).st_mtime_ns for name in records]
    run.main(["table5", "--quick", "--jobs", "1", "--out", str(quick)])
    assert (quick / "results.md").read_text() == page
    assert [os.stat(quick / "results" / name).st_mtime_ns for name in records] == times


def only(monkeypatch, name, *labels):
    """Leave an experiment these rows, and no claims about the others."""
    monkeypatch.setattr(EXPERIMENTS[name], "rows", {label: EXPERIMENTS[name].rows[label] for label in labels})
    monkeypatch.setattr(EXPERIMENTS[name], "claims", ())


def test_a_backbone_and_data_of_ones_own(tiny_world, tmp_path, monkeypatch):
    only(monkeypatch, "table5", "Base with reasoning", "GRACE, full (rollouts at temperature 0.7)")
    data, out = tiny_world / "data", tmp_path / "mine"
    files = ["--model", f"{tiny_world}/model", "--data", f"{data}/train.jsonl", "--heldout", f"{data}/heldout.jsonl"]
    (tmp_path / "plain.txt").write_text("the boat sold the lamp\n\nnoon near the forest\n")
    files += ["--plain", str(tmp_path / "plain.txt")]
    run.main(["table5", "--quick", "--jobs", "1", "--out", str(out), *files, "--set", "lr=1e-4", "weight_decay=0"])
    page = (out / "results.md").read_text()
    assert "instructions followed" in page and COLUMNS["plain loss"][0] in page and COLUMNS["answers loss"][0] in page


def test_real_tasks_for_both_backbones(tiny_world, tmp_path, monkeypatch):
    only(monkeypatch, "real", "toy: start", "given: start", "given: GRACE, full, tuned here")
    write_all(tmp_path / "tasks")
    files = ["--model", f"{tiny_world}/model", "--data", f"{tiny_world}/data/train.jsonl", "--data-dir", f"{tmp_path}/tasks"]
    run.main(["real", "--quick", "--jobs", "1", "--out", str(tmp_path), *files])
    page = (tmp_path / "results.md").read_text()
    assert "| hashed words, no model |" in page and page.count(", with rationale |") == page.count(", prompt alone |") == 3


def test_the_page_is_what_the_records_make_it():
    with open(os.path.join("docs", "results.md")) as file:
        assert file.read() == whole_page(EXPERIMENTS, Place())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["table3"], "unknown experiment 'table3'"),
        ([], "name an experiment"),
        (["real", "--data", "x"], "real needs --model"),
        (["captions", *"--model x --data x --data-dir x --heldout x".split()], "captions needs --heldout and --plain"),
        (["table1", "--data", "x"], "give --out"),
        (["table1", "--plain", "x"], "give --out"),
        (["real", "--model", "x", "--data", "x", "--data-dir", "x"], "give --out"),
        (["table1", "--model", "x", "--out", "y"], "--model needs --data"),
        (["table1", "--set", "learning_rate=1"], "no setting 'learning_rate'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(GraceError, match=message):
        run.main(arguments)


# ---------------------------------------------------------------- pictures


def drawn(name):
    """One experiment's figure, from the committed records."""
    by_label = {}
    for label, one in EXPERIMENTS[name].runs():
        by_label.setdefault(label, []).append(Place().read(one))
    return EXPERIMENTS[name].figure(by_label)


def on_canvas(figure):
    """Whether all that a figure draws lies within it."""
    figure.draw_without_rendering()
    notes = [
        note.get_window_extent().transformed(figure.dpi_scale_trans.inverted()) for axis in figure.axes for note in axis.texts
    ]
    width, height = figure.get_size_inches()
    boxes = [figure.get_tightbbox(), *notes]
    return all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)


@pytest.mark.parametrize("name", [name for name, one in EXPERIMENTS.items() if one.figure and one.whole])
def test_no_picture_is_cut(name):
    matplotlib = pytest.importorskip("matplotlib", reason="the pictures need the extra `plot`")
    figure = drawn(name)
    assert on_canvas(figure)
    for axis in figure.axes:
        boxes = [matplotlib.text.Text.get_window_extent(note) for note in axis.texts]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    if name == "frontier":
        assert sum(len(axis.texts) for axis in figure.axes) == 2 * len(EXPERIMENTS["frontier"].rows)


def test_what_is_cut_is_seen():
    pytest.importorskip("matplotlib", reason="the pictures need the extra `plot`")
    figure, (axis,) = pictures.canvas()
    axis.plot([0, 1], label="a label that is as long as the labels of Table 1 are")
    axis.plot([1, 0], label="and another one, so that both do not fit")
    assert on_canvas(figure)
    figure.legend(loc="lower center", ncol=2)
    assert not on_canvas(figure)
    figure.legends[0].remove()
    pictures.add_legend(figure, axis)
    assert on_canvas(figure) and figure.legends[0]._ncols == 1
    axis.annotate("outside", (1, 1), (400, 0), textcoords="offset points", in_layout=False)
    assert not on_canvas(figure)


# ---------------------------------------------------------------- benchmarks

SMALL_BENCH = "--shape 0.4m --batch 4 --rollouts 2 --max-new-tokens 4 --prompt-tokens 20 --device cpu".split()


@pytest.mark.parametrize("name", [name for name in sorted(os.listdir("bench")) if name.endswith(".py")])
def test_a_benchmark_runs_on_this_code(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend("bench")
    monkeypatch.setattr(grace, "roll_out", grace.roll_out)  # bench/step.py replaces both by timed ones
    monkeypatch.setattr(grace, "judge", grace.judge)
    more = {"step.py": ["--steps", "1"], "rollout.py": ["--repeats", "1"]}
    monkeypatch.setattr("sys.argv", [name, *SMALL_BENCH, *more.get(name, [])])
    runpy.run_path(os.path.join("bench", name), run_name="__main__" if name in more else "bench")
    if name in more:
        assert {"step.py": "\nstep_s ", "rollout.py": "update: prompt once"}[name] in capsys.readouterr().out


def test_the_towns_settings_are_those_of_train_sh():
    with open("train.sh") as file:
        script = file.read()
    town_line = re.search(r"^  town\)\n.*\n    settings=\((.*)\)", script, flags=re.M)[1]
    for_all = re.search(r"grace\.py .*(--batch.*?) \"\$\{settings", script)[1]
    assert parse(shlex.split(f"{town_line} {for_all}"), "") == Place().config(WALKING)
