"""The same vectors through mteb itself, where it is installed (`pip install mteb==2.26.24`)."""

from types import SimpleNamespace

import pytest
import synthetic_tasks

from evaluation.tasks import evaluate_tasks

mteb = pytest.importorskip("mteb", reason="mteb is not installed")

TOLERANCE = {"classification": 3e-3, "clustering": 1e-6}


@pytest.mark.parametrize("encode", [synthetic_tasks.encode, synthetic_tasks.counts])
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_are_mtebs(tmp_path, monkeypatch, encode, seed):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))  # it mixes up folders of one name
    from eval_mteb_subset import mteb_encoder
    from evaluation.tasks import TASKS

    names = synthetic_tasks.write_all(tmp_path / "tasks", seed)
    ours = evaluate_tasks(encode, names, str(tmp_path / "tasks"))
    for name in names:
        task = mteb.get_task(
            name, eval_splits=["test"], hf_subsets={"STS17": ["en-en"], "MassiveIntentClassification": ["en"]}.get(name)
        )
        task.metadata.dataset["path"], task.metadata.dataset["revision"] = str(tmp_path / "tasks" / name), "1"
        theirs = mteb.evaluate(mteb_encoder(SimpleNamespace(encode=encode)), [task], cache=None)[0].get_score()
        assert ours[name]["main_score"] == pytest.approx(theirs, abs=TOLERANCE.get(TASKS[name].family, 1e-5)), name
        print(f"{name:30} {ours[name]['main_score']:.6f} {theirs:.6f}")
