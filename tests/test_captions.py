"""Tables on captions: rows from groups, what is true of a rationale, what is still followed, and a run of each kind."""

import itertools
import json

import captions
import numpy as np
import pytest
import run
import torch
import truth
from captions import content_words
from chats import INSTRUCTIONS
from conftest import TEXTS, rolled
from page import Claim, Experiment, search_lines, section
from real import BEST, EXPERIMENTS, IN_TIME, KINDS, OTHER_TASKS, REASONING, SEARCH, SIZES, TABLE, TEXT_TERM, TRIED, share_lines
from record import Place, read_records, reading_otherwise
from scores import WAYS
from synthetic_tasks import write_all
from tables import EXPERIMENTS as ALL

from evaluation.encoder import GraceEncoder, encode_texts
from evaluation.tasks import evaluate_tasks, evaluate_triplets
from plumbing.errors import GraceError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_words_of_one_stem_are_one_and_function_words_are_none():
    assert len({*content_words("He rides, she is riding a ride")}) == 1
    assert content_words("Two dogs are running on THE grass!") == ["two", "dog", "run", "gras"]
    assert content_words("with the other of them") == []


@pytest.fixture
def rows(tmp_path):
    """What captions.py writes about 40 groups of three captions and four triplets, two of which give away what is held back."""
    groups = [{"id": i, "captions": [f"a{i} b{i} c", f"a{i} b{i} d", f"a{i} e{i} d"]} for i in range(40)]
    path = write(tmp_path / "groups.jsonl", groups)
    quiet = captions.build([path], [], None, None, str(tmp_path / "first"), search=10)
    known = json.loads((tmp_path / "first" / "search.jsonl").read_text().splitlines()[0])["query"]
    texts = [("held back", "u", "v"), ("new", "x", "y"), ("other", "v", "y"), (known, "x", "y")]
    triplets = [dict(zip(("query", "positive", "negative", "source"), (*three, "s"))) for three in texts]
    (tmp_path / "plain.txt").write_text("A title\n\nOne two three\nfour five six.\n\n" + "too long " * 30)
    heldout = write(tmp_path / "heldout.jsonl", [{"captions": ["one", "two", "three"]}, {"captions": ["alone"]}])
    triplets = write(tmp_path / "triplets.jsonl", triplets)
    counts = captions.build([path], [triplets], heldout, str(tmp_path / "plain.txt"), str(tmp_path / "out"), search=10)
    assert quiet == dict(train=30, triplets=0, search=10, heldout=0, texts=60)
    assert counts == dict(train=31, triplets=1, search=10, heldout=1, texts=62)
    read = lambda name: [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
    return {name: read(name) for name in counts} | {"plain": (tmp_path / "out" / "plain.txt").read_text()}


def test_rows_come_from_one_group_each_and_negatives_from_another(rows):
    number = lambda text: text.split()[0]
    for row in rows["train"][:30]:
        assert number(row["query"]) == number(row["positive"]) != number(row["negative"]) and row["query"] != row["positive"]
        # All groups share c or d and nothing else: the negative shares what can be shared.
        assert {row["query"].split()[-1]} == {row["negative"].split()[-1]}
    assert rows["train"][30] == {"query": "new", "positive": "x", "negative": "y"}
    assert rows["triplets"] == [{"query": "held back", "positive": "u", "negative": "v"}]
    assert rows["heldout"] == [{"query": "one", "positive": "two", "support": ["one", "two", "three"]}]
    assert rows["plain"] == "One two three four five six.\n"


def test_no_group_to_search_by_is_trained_on(rows):
    held_back = {row["query"].split()[0] for row in rows["search"]}
    assert len(held_back) == 10 and not held_back & {row["query"].split()[0] for row in rows["train"]}


def test_a_row_with_two_lists_or_too_few_groups_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n\n{"b": 2}\n')
    assert captions.read_rows(tmp_path / "rows.jsonl") == [{"a": 1}, {"b": 2}]
    for text, why in (("{}\n{", "line 2 is not JSON"), ("{}\n3\n", "line 2 is no JSON object")):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(GraceError, match=why):
            captions.read_rows(tmp_path / "rows.jsonl")
    with pytest.raises(GraceError, match="line 1: 2 lists"):
        captions.read_groups(write(tmp_path / "a.jsonl", [{"a": ["x"], "b": ["y"]}]))
    with pytest.raises(GraceError, match="lower --search"):
        captions.build([write(tmp_path / "b.jsonl", [{"a": ["x", "y"]}])], [], None, None, str(tmp_path))


def test_truth_counts_content_words():
    texts = ["A dog runs.", "The cat sleeps."]
    support = {"A dog runs.": ["A dog runs.", "A brown dog on grass"], "The cat sleeps.": ["The cat sleeps."]}
    #             dog: copied; brown: supported; cat: of the next text alone; horse: made up
    found = truth.truth(["the dog, a brown cat, a horse", "a dog sleeps"], texts, support)
    assert found == pytest.approx({"true": 3 / 6, "copied": 2 / 6, "by_chance": 2 / 6})
    assert truth.truth(["", "the"], texts, support) == {"true": 0, "copied": 0, "by_chance": 0}


def test_a_hard_negative_is_told_apart_where_the_positive_is_nearer():
    angle = {"a": 0.0, "near": 0.2, "far": 0.9, "as near": -0.2}
    encode = lambda texts: np.array([[np.cos(angle[text]), np.sin(angle[text])] for text in texts])
    rows = [("a", "near", "far"), ("a", "far", "near"), ("a", "near", "as near"), ("far", "near", "a")]
    rows = [dict(zip(("query", "positive", "negative"), row)) for row in rows]
    assert truth.told_apart(encode, rows) == 0.5


def test_texts_of_several_captions_find_each_other():
    """Against the rank of the right text, found in a loop; and with an encoder that knows every caption."""
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(23)]
    vectors = {row[role]: np.random.default_rng(i).normal(size=16) for i, row in enumerate(rows) for role in row}
    noise = np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)
    assert truth.longer(lambda texts: np.float32([sum(vectors[w] for w in t.split()) for t in texts]), rows, (1, 2, 4)) == {
        "1": 1, "2": 1, "4": 1,
    }  # fmt: skip
    seen = []
    score = truth.longer(lambda texts: seen.append(texts) or noise.reshape(10, 16), rows, (4,))["4"]
    assert seen == [[" ".join(f"{x}{i}" for i in range(j, j + 4)) for x in "qp" for j in range(0, 20, 4)]]
    near = [[a @ b / np.linalg.norm(b) for b in noise[1]] for a in noise[0]]
    assert score == pytest.approx(np.mean([1 / np.log2(2 + sum(x > row[i] for x in row)) for i, row in enumerate(near)]))


def test_what_an_answer_to_each_instruction_must_do():
    shorter, words, repeat = truth.OTHERS.values()
    assert shorter("a dog runs", "a dog") and not shorter("a dog", "a dog runs")
    assert words("a dog runs", "dog runs") and not words("a dog runs", "the dog")
    assert repeat("A dog runs fast", "a dog runs slowly") == 0.75


def test_what_is_still_followed(make_policy, monkeypatch):
    """The start's loss on its own answers is the least that any policy has on them, in the mean; obeying is counted."""
    start, other = make_policy(), make_policy(seed=1)
    mine, others = truth.follow_others(start, start, TEXTS), truth.follow_others(start, other, TEXTS)
    assert mine["other_loss"] < others["other_loss"] - 0.1
    obeyed = {"shorter": lambda text, answer: text == TEXTS[0], "repeat": lambda text, answer: 0.5}
    monkeypatch.setattr(truth, "OTHERS", obeyed)
    n = len(TEXTS)
    assert truth.follow_others(start, start, TEXTS)["other_right"] == pytest.approx((1 + 0.5 * n) / (2 * n))
    trained = reading_otherwise(start, instruction=INSTRUCTIONS["repeat"][0])  # an instruction that was trained is no other
    assert truth.follow_others(start, trained, TEXTS)["other_right"] == pytest.approx(1 / n)


def test_retrieval_by_averaged_rationales_row_by_row(make_policy):
    """Against the mean of each text's drawn embeddings, ranked in a loop."""
    policy = make_policy()
    words = "doctor lamp boat forest street child winter noon sofa somebody".split()
    texts = [f"the {one} near the {two}" for one, two in itertools.permutations(words[:6], 2)]
    rows = [{"query": texts[i], "positive": texts[-1 - i], "negative": []} for i in range(15)]
    scores = truth.averaged(policy, rows, temperature=1.5, numbers=(1, 3))
    assert scores["0"] == pytest.approx(evaluate_triplets(policy, rows)["ndcg_at_10"])
    drawn = [encode_texts(policy, texts, temperature=1.5, seed=seed).vectors for seed in range(3)]
    for n in (1, 3):
        mean, total = sum(drawn[:n]), 0
        mean = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        for i in range(15):
            near = mean[15:] @ mean[i]
            rank = 1 + int((near > near[14 - i]).sum())
            total += 1 / np.log2(rank + 1) if rank <= 10 else 0
        assert scores[str(n)] == pytest.approx(total / 15, rel=1e-6)
    assert len(set(scores.values())) == 3


def test_similarity_by_kind_is_that_of_the_kinds_own_pairs(tmp_path):
    vector = {"a": [1.0, 0.0], "b": [0.8, 0.6], "c": [0.0, 1.0]}
    encode = lambda texts: np.array([vector[text] for text in texts])
    folder = tmp_path / "STSBenchmark"
    folder.mkdir()
    pairs = {  # cosines 1, 0.8, 0.6, 0: scores in that order, in the opposite one, and neither
        "main-captions": [("a", "a", 5.0), ("a", "b", 4.0), ("b", "c", 3.0), ("a", "c", 2.0)],
        "main-news": [("a", "a", 1.0), ("a", "b", 2.0), ("b", "c", 3.0), ("a", "c", 4.0)],
        "main-forums": [("a", "a", 5.0), ("a", "b", 3.0), ("b", "c", 4.0), ("a", "c", 2.0)],
    }
    named = [dict(zip(("sentence1", "sentence2", "score"), pair), genre=kind) for kind in pairs for pair in pairs[kind]]
    write(folder / "test.jsonl", named[::2] + named[1::2])
    expected = {"captions": 1.0, "news": -1.0, "forums": 1 - 6 * 2 / (4 * 15)}  # by Spearman's own formula, without ties
    assert truth.by_genre(encode, str(tmp_path)) == pytest.approx(expected)
    write(folder / "test.jsonl", [{k: x for k, x in row.items() if k != "genre"} for row in named])
    assert truth.by_genre(encode, str(tmp_path)) == {}


def test_a_claim_may_fix_the_way_of_its_first_row():
    record = lambda greedy, alone: {
        "run": {"seed": 0}, "after": {"ndcg_at_10": greedy}, "after_without_rationale": {"ndcg_at_10": alone},
    }  # fmt: skip
    by_label = {"a": [record(0.5, 0.9)], "b": [record(0.7, 0.6)]}
    assert "agrees" in Claim("", [("a", "b")]).verdict(by_label)
    assert "disagrees" in Claim("", [("a", "b")], way="after").verdict(by_label)
    assert Claim("", [("a", "c")]).verdict(by_label) == "not measured yet"


def test_a_search_may_have_rows_without_training():
    record = lambda trainer, score: {
        "run": {"trainer": trainer}, "config": {"steps": 1000}, "curve": [],
        "before": {"ndcg_at_10": 0.1}, "after": {"ndcg_at_10": score}, "after_without_rationale": {"ndcg_at_10": 0.1},
    }  # fmt: skip
    untrained, trained = [record("none", 0.3)], [record("GRACE", 0.5)]
    lines = search_lines({"untrained: repeat": untrained, "GRACE: lr 1": trained})
    assert "| untrained: repeat | **0.300** | 0 | 0 | with rationale |" in lines
    assert "| GRACE: lr 1 | **0.500** | 1000 | 1000 | with rationale |" in lines and not any("The start" in x for x in lines)
    assert "The start: nDCG@10 0.100" in search_lines({"GRACE: lr 1": trained})[-1]


def test_rows_that_are_compared_are_searched_with_the_same_budget():
    assert min(map(len, TRIED.values())) == 3 and len(TRIED[BEST]) == len(TRIED[TEXT_TERM]) == 6
    assert set(TRIED) == set(KINDS) <= set(TABLE) and len(SEARCH) == sum(map(len, TRIED.values()))
    seeds = {name: set(one.seeds) for name, one in EXPERIMENTS.items()}
    searched = set().union(*(seeds.pop(name) for name in list(seeds) if name.startswith("captions_") and "search" in name))
    assert not searched & set().union(*seeds.values())


def test_a_search_with_several_seeds_shows_their_means():
    scores = lambda final, early: {
        "run": {"trainer": "GRACE"}, "config": {"steps": 9}, "curve": [{"step": 5, "ndcg_at_10": early}],
        "before": {"ndcg_at_10": 0.1}, "after": {"ndcg_at_10": final}, "after_without_rationale": {"ndcg_at_10": 0.2},
    }  # fmt: skip
    lines = search_lines({"GRACE: lr 1": [scores(0.9, 0.6), scores(0.1, 0.6)]})  # 0.5 at the end, 0.6 before
    assert "| GRACE: lr 1 | **0.600** | 5 | 9 | with rationale |" in lines


def test_halves_are_the_states_of_the_prompt_and_those_of_the_rationale(make_policy):
    policy = make_policy()
    found, rollouts = truth.halves(policy, TEXTS), rolled(policy, K=1, temperature=0.0)
    for i, text in enumerate(TEXTS):
        prompt, counted = (x[i][rollouts.prompt_mask[i].bool()] for x in (rollouts.prompt_ids, rollouts.counted))
        rationale = rollouts.ids[i, 0][rollouts.mask[i, 0].bool()]
        with torch.no_grad():
            out = policy.model(input_ids=torch.cat([prompt, rationale])[None], output_hidden_states=True, use_cache=False)
        states = out.hidden_states[-1][0].numpy()
        expected = states[: len(prompt)][counted.bool().numpy()], states[len(prompt) :]
        *sums, n, m = found[text]
        assert (n, m) == tuple(map(len, expected)) and n != m
        for one, other in zip(sums, expected):
            np.testing.assert_allclose(one, other.sum(0), rtol=1e-4, atol=1e-5)


def test_scores_by_the_prompts_share(make_policy, tmp_path):
    """At the ends and by tokens they are those of the encoder; between them w weighs the two means."""
    write_all(tmp_path / "tasks")
    rows = [dict(zip(("query", "positive"), text.rsplit(" ", 5)[:2])) for text in (*TEXTS, *(f"so {text}" for text in TEXTS))]
    heldout, policy = write(tmp_path / "heldout.jsonl", rows), make_policy()
    write(tmp_path / "search.jsonl", rows[:3])
    place = Place(quick=True, heldout=heldout, data_dir=str(tmp_path / "tasks"))
    scores = truth.by_share(policy, place)
    for w, rationale in ((truth.BY_TOKENS, True), (1.0, False)):
        encode = GraceEncoder(policy, rationale=rationale).encode
        tasks = evaluate_tasks(encode, ["STSBenchmark", "STS17"], place.data_dir)
        mean = np.mean([result["main_score"] for result in tasks.values()])
        expected = {"searched": truth.among(encode, rows[:3]), "ndcg_at_10": truth.among(encode, rows), "mean of tasks": mean}
        assert scores[str(w)] == pytest.approx(expected, abs=1e-4)
    known = truth.halves(policy, [row[role] for row in rows for role in row])

    def by_hand(texts):
        parts = [0.75 * np.float64(p) / n + 0.25 * np.float64(r) / m for p, r, n, m in (known[text] for text in texts)]
        return np.stack([x / np.sqrt((x * x).sum()) for x in parts])

    assert scores["0.75"]["ndcg_at_10"] == pytest.approx(truth.among(by_hand, rows), abs=1e-6)
    assert len({x["ndcg_at_10"] for x in scores.values()}) > 3


def test_the_share_that_the_search_rows_choose_is_bold():
    one, two = ({"searched": s, "ndcg_at_10": x, "mean of tasks": x / 2} for s, x in ((0.2, 0.9), (0.4, 0.5)))
    lines = share_lines({"A": [{"shares": {"0.0": one, "1.0": two}}, {"shares": {"0.0": one, "1.0": one}}], "B": [{}]})
    assert [line for line in lines if line.startswith("| A")] == ["| A | 0.900 | **0.700** |", "| A | 0.450 | **0.350** |"]
    assert not any(line.startswith("| B") for line in lines) and not share_lines({"B": [{}]})


def test_one_command_makes_the_tables(tiny_world, tmp_path, monkeypatch):
    """Two rows of Table 1, of Table 5 and of the further tasks, from files; the rest is left for later."""
    write_all(tmp_path / "tasks")
    for name, rows in (("captions", [REASONING, IN_TIME]), ("captions_retention", [REASONING, IN_TIME])):
        monkeypatch.setattr(ALL[name], "rows", {label: TABLE[label] for label in rows})
    monkeypatch.setattr(ALL["captions_tasks"], "rows", {label: OTHER_TASKS[label] for label in (REASONING, TEXT_TERM)})
    with open(f"{tiny_world}/data/heldout.jsonl") as file:
        heldout = [json.loads(line) | {"support": [json.loads(line)["query"]]} for line in file]
    del heldout[0]["support"]  # no other text of its meaning is known
    files = dict(model=f"{tiny_world}/model", data=f"{tiny_world}/data/train.jsonl", plain=tmp_path / "plain.txt")
    files["plain"].write_text("the nurse fixed a lamp\n")
    files["heldout"] = write(tmp_path / "heldout.jsonl", heldout)
    write(
        tmp_path / "triplets.jsonl",
        [{k: row[k] if k != "negative" else row[k][0] for k in row if k != "support"} for row in heldout],
    )
    flags = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    more = ["--data-dir", f"{tmp_path}/tasks", "--quick", "--jobs", "1", "--out", str(tmp_path / "out")]
    run.main(["captions", "captions_retention", "captions_tasks", *flags, *more])
    page = (tmp_path / "out" / "results.md").read_text()
    assert all(f"*{text}*\n" in page for text in truth.SHOWN)
    assert "## Captions: Table 1\n" in page and "## Captions: Table 5" in page and "nan" not in page
    assert "## Captions: SICK-R" in page and "| hashed words, no model |" in page and "which one, of as many" in page
    assert f"| {IN_TIME} |" in page and "several sampled rationales averaged" in page and "not measured yet" in page
    records = read_records(str(tmp_path / "out" / "results" / "real.jsonl"))
    assert len(records) == 4
    for record in records.values():
        measured = {"true", "other_loss", "plain_loss", "STS17", "mean of tasks"}
        assert record["rationales"] == []
        assert set(record["after"]) >= measured or record["run"]["probe"] == "captions tasks"
        assert not any(row["query"] in json.dumps(record) for row in heldout)
    samples = list((tmp_path / "out" / "worlds" / "samples").iterdir())
    assert len(samples) == 2 and heldout[0]["query"] in samples[0].read_text()


def test_the_frontier_shows_every_row():
    matplotlib = pytest.importorskip("matplotlib", reason="the pictures need the extra `plot`")

    def record(score, loss):
        figures = {"ndcg_at_10": score, "mean of tasks": score / 2}
        return {"before": {"plain_loss": 3.0}, "after": figures | {"plain_loss": loss}, "after_without_rationale": {}}

    by_label = {label: [record(0.1 * i, 3 + i), record(0.1 * i + 0.02, 3.5 + i)] for i, label in enumerate(KINDS)}
    figure = EXPERIMENTS["captions_frontier"].figure(by_label)
    for axis, scale in zip(figure.axes, (1, 0.5)):
        lines = {bar.get_label(): bar.lines[0].get_xydata()[0].tolist() for bar in axis.containers}
        expected = {label: [i + 0.25, scale * (0.1 * i + 0.01)] for i, label in enumerate(KINDS)}
        assert lines.keys() == expected.keys() and all(lines[label] == pytest.approx(expected[label]) for label in lines)
    assert isinstance(figure, matplotlib.figure.Figure) and len(figure.legends[0].texts) == len(KINDS)


def test_the_sizes_show_each_row_by_its_better_way():
    pytest.importorskip("matplotlib", reason="the pictures need the extra `plot`")

    def record(rationale, alone):
        return {way: {"ndcg_at_10": x, "mean of tasks": x / 2} for way, x in zip(WAYS, (rationale, alone))}

    by_label = {f"{REASONING}, {size}": [record(0.3, 0.0)] * 3 for size in SIZES}
    by_label |= {f"{TEXT_TERM}, {size}": [record(0.1, 0.4 + i), record(0.1, 0.6 + i)] for i, size in enumerate(SIZES)}
    by_label[f"{BEST}, 1.3 M"] = [record(0.5, 0.2)]  # not yet measured at the other sizes
    figure = EXPERIMENTS["captions_sizes"].figure(by_label)
    for axis, scale in zip(figure.axes, (1, 0.5)):
        lines = {bar.get_label(): bar.lines[0] for bar in axis.containers}
        points = {label: found.get_xydata().flatten().tolist() for label, found in lines.items()}
        scores = {REASONING: (0.3, 0.3, 0.3), TEXT_TERM: (0.5, 1.5, 2.5)}
        expected = {row: [x for n, y in zip((1.3, 4.2, 15.5), ys) for x in (n, y * scale)] for row, ys in scores.items()}
        assert points.keys() == expected.keys() and all(points[x] == pytest.approx(expected[x]) for x in expected)
        assert lines[TEXT_TERM].get_mfc() == "white" != lines[REASONING].get_mfc()


def test_a_run_starts_from_the_folder_that_it_names(tmp_path):
    place = Place(results=str(tmp_path), model="models/captions4m/", data="rows")
    small = {"trainer": "none", "seed": 0, "backbone": "captions1m"}
    assert place.start(small) == "models/captions1m" and place.start({"backbone": "given"}) == place.start({}) == place.model
    place.write(small, {"run": small, "backbone": "captions1m"})
    assert place.read(small) and place.read(small | {"backbone": "given"}) is None
    place.write(small, {"run": small, "backbone": "captions4m"})  # a record of another model is none of this one
    assert place.read(small) is None


def test_a_section_says_which_rows_lack_seeds(tmp_path):
    rows = {"all": {"trainer": "x"}, "one": {"trainer": "y"}, "none": {"trainer": "z"}}
    place, experiment = Place(results=str(tmp_path)), Experiment("Title", "", rows, (), whole=False)
    for trainer, seed in (("x", 0), ("x", 1), ("x", 2), ("y", 0)):
        record = {"run": {"trainer": trainer, "seed": seed}, "config": dict(batch=2, rollouts=2, steps=1, lr=1)}
        place.write(record["run"], record | {"seconds": 1, "revision": "abc"})
    assert "Not all seeds yet: one (1 of 3); none (0 of 3). " in section("name", experiment, place)
    experiment.rows = {"all": rows["all"]}
    assert "yet" not in section("name", experiment, place)


def test_a_table_without_records_is_left_out_of_the_page(tmp_path):
    assert section("captions", EXPERIMENTS["captions"], Place(results=str(tmp_path))) is None
