import sys
import types

import pytest

from prunery.errors import ModelError, RecipeError
from prunery.pipelines.compression.gate import TaskScore
from prunery.pipelines.compression.harness import task_scores

RESULTS = {
    "results": {
        "story": {"alias": "story", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.6,
                  "acc_norm_stderr,none": "N/A"},
        "text": {"word_perplexity,none": 12.0, "word_perplexity_stderr,none": "N/A"},
        "odd": {"alias": "odd"},
    },
    "higher_is_better": {"story": {"acc": True}, "text": {"word_perplexity": False}},
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """A stand-in for the harness that answers with RESULTS and notes what it was asked."""
    calls = []
    package, tasks = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.tasks")

    class TaskManager:
        def __init__(self, include_path=None):
            self.all_tasks = ["story", "text", "odd"]

    def simple_evaluate(**options):
        calls.append(options)
        return RESULTS

    tasks.TaskManager, package.simple_evaluate = TaskManager, simple_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    return calls


def test_scores_are_read_and_higher_is_better(asked, tmp_path):
    found = task_scores(tmp_path, ["story", "text"], limit=7, seed=3)
    assert found["story"].metric == "acc_norm" and found["story"].value == 0.6
    assert found["story"].stderr != found["story"].stderr
    assert found["text"].value == -12.0
    assert asked[0]["limit"] == 7 and asked[0]["fewshot_random_seed"] == 3
    assert asked[0]["model_args"] == {
        "pretrained": str(tmp_path),
        "dtype": "auto",
        "trust_remote_code": False,
    }


def test_a_task_without_numbers_and_an_unknown_one_are_refused(asked, tmp_path):
    with pytest.raises(ModelError, match="expected odd to report a number"):
        task_scores(tmp_path, ["odd"], limit=None, seed=0)
    with pytest.raises(RecipeError, match="found nothing_known"):
        task_scores(tmp_path, ["nothing_known"], limit=None, seed=0)


def test_a_task_that_cannot_run_is_named(asked, tmp_path, monkeypatch):
    def offline(**_):
        raise ConnectionError("no data here")

    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", offline)
    with pytest.raises(ModelError, match="to run story; found ConnectionError: no data here"):
        task_scores(tmp_path, ["story"], limit=None, seed=0)


def test_without_the_harness_the_install_line_is_given(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RecipeError, match="pip install lm-eval"):
        task_scores(tmp_path, ["story"], limit=None, seed=0)


def test_the_real_harness_scores_a_model(tmp_path):
    pytest.importorskip("lm_eval")
    from ...tiny_causal import saved_model

    folder = saved_model(tmp_path, "llama")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "a few", "c": ["words", "to"], "a": 0}\n' * 8)
    (tmp_path / "tiny_choice.yaml").write_text(
        "task: tiny_choice\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\n"
        "doc_to_choice: c\ndoc_to_target: a\nmetric_list: [{metric: acc}]\n"
    )
    found = task_scores(folder, ["tiny_choice"], limit=8, seed=0, task_folder=str(tmp_path))
    score = found["tiny_choice"]
    assert isinstance(score, TaskScore)
    assert score.metric == "acc" and score.value in (0.0, 1.0)
