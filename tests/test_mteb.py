"""In mteb itself, where it is installed (`pip install mteb==2.26.24`): the same scores, and an encoder as it wants one."""

from functools import partial
from types import SimpleNamespace

import pytest
import synthetic_tasks
from conftest import TEXTS

from eval_mteb_subset import mteb_encoder
from evaluation.encoder import GraceEncoder
from evaluation.tasks import TASKS, evaluate_tasks

mteb = pytest.importorskip("mteb", reason="mteb is not installed")
from mteb.types import PromptType  # noqa: E402

VARIANTS = ("one", {}), ("two", {}), ("one", {"max_new_tokens": 2}), ("one", {"rationale": False})
TOLERANCE = {"classification": 3e-3, "clustering": 1e-6}


@pytest.mark.parametrize("encode", [synthetic_tasks.encode, synthetic_tasks.counts])
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_are_mtebs(tmp_path, monkeypatch, encode, seed):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))  # it mixes up folders of one name
    names = synthetic_tasks.write_all(tmp_path / "tasks", seed)
    ours = evaluate_tasks(encode, names, str(tmp_path / "tasks"))
    for name in names:
        task = mteb.get_task(
            name, eval_splits=["test"], hf_subsets={"STS17": ["en-en"], "MassiveIntentClassification": ["en"]}.get(name)
        )
        task.metadata.dataset["path"], task.metadata.dataset["revision"] = str(tmp_path / "tasks" / name), "1"
        encoder = SimpleNamespace(encode=encode, encode_document=encode, name="grace/synthetic", revision="1")
        theirs = mteb.evaluate(mteb_encoder(encoder), [task], cache=None)[0].get_score()
        assert ours[name]["main_score"] == pytest.approx(theirs, abs=TOLERANCE.get(TASKS[name].family, 1e-5)), name


def test_mtebs_own_check(make_policy):
    """All of its text tasks run."""
    results = mteb.mock_run(mteb_encoder(GraceEncoder(make_policy())))
    assert results.all_passed, results.to_markdown()
    assert results["MockRetrievalTask"] and results["MockSTSTask"] and results["MockClassificationTask"]


def test_queries_think_and_documents_are_read(make_policy):
    thinks = GraceEncoder(make_policy(documents="prompt"))
    reads = GraceEncoder(thinks.policy, rationale=False)
    encode = partial(mteb_encoder(thinks).encode, [{"text": TEXTS[:2]}, {"text": TEXTS[2:]}])
    for kind, reader in (None, thinks), (PromptType.query, thinks), (PromptType.document, reads):
        vectors = encode(task_metadata=None, hf_split="test", hf_subset="default", prompt_type=kind)
        assert (vectors == reader.encode(TEXTS)).all()


def test_name_and_revision_are_the_checkpoints(make_policy, tmp_path):
    """So mteb's cache never takes one checkpoint's scores, or one way of reading's, for another's."""
    make_policy().save(tmp_path / "one")
    make_policy(seed=1).save(tmp_path / "two")
    encoders = [GraceEncoder(str(tmp_path / name), device="cpu", **more) for name, more in VARIANTS]
    about = [mteb_encoder(encoder).mteb_model_meta for encoder in encoders]
    assert [meta.name for meta in about] == ["grace/one", "grace/two", "grace/one", "grace/one"]
    assert len({meta.revision for meta in about}) == 4
    assert GraceEncoder(encoders[0].policy).revision == encoders[0].revision
