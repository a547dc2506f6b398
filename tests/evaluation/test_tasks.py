"""Tasks through lm-eval: the numbers are its own, offline too, and the same questions go to every model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from evaluation_model import saved, tiny_model, word_tokenizer
from task_questions import COUNT, as_published, questions, written

import secateur
from secateur.evaluation.tasks import finding, harness
from secateur.evaluation.tasks.local import DEFINITIONS, KNOWN
from secateur.evaluation.tasks.prompts import in_sentence_case
from secateur.evaluation.tasks.results import Score, mean_of

ALL = ",".join(KNOWN)
OWN_DEFINITIONS = {
    "boolq": "super_glue/boolq/default",
    "piqa": "piqa/piqa",
    "hellaswag": "hellaswag/hellaswag",
    "winogrande": "winogrande/default",
    "arc_easy": "arc/arc_easy",
    "arc_challenge": "arc/arc_challenge",
    "openbookqa": "openbookqa/openbookqa",
    "lambada_openai": "lambada/lambada_openai",
}
"""Where lm-eval itself defines each task."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("models")
    return [saved(base / "dense"), saved(base / "pruned", seed=1, intermediate_size=24)]


@pytest.fixture(scope="module")
def evaluation(models: list[Path], folder: Path) -> Any:
    return secateur.evaluate_tasks(models, ALL, tasks_dir=folder)


def lm_eval_itself(model: Path, folder: Path, **settings: Any) -> dict[str, Any]:
    """What ``lm_eval --model hf --model_args pretrained=MODEL`` does."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=DEFINITIONS, include_defaults=False, metadata={"tasks_dir": str(folder)})
    return simple_evaluate(
        "hf", f"pretrained={model}", tasks=list(KNOWN), task_manager=manager, batch_size=1, device="cpu", bootstrap_iters=1000,
        **settings,
    )  # fmt: skip


def figures(scores: dict[str, dict[str, Score]]) -> dict[str, dict[str, float | None]]:
    """Scores under lm-eval's names."""
    return {
        task: {f"{name},none": score.value for name, score in metrics.items()}
        | {f"{name}_stderr,none": score.standard_error for name, score in metrics.items()}
        for task, metrics in scores.items()
    }


def assert_same(ours: dict[str, dict[str, Score]], theirs: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    for task, metrics in figures(ours).items():
        assert {key: value for key, value in metrics.items() if key not in but} == {
            key: value for key, value in theirs[task].items() if "," in key and key not in but
        }


def test_numbers_are_those_of_lm_eval_on_the_folder(
    models: list[Path], folder: Path, evaluation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    scores = evaluation.models["pruned"].scores
    assert_same(scores, lm_eval_itself(models[1], folder)["results"])
    assert len({score.value for metrics in scores.values() for score in metrics.values()}) > 3
    assert scores != evaluation.models["dense"].scores


@pytest.mark.parametrize("task", KNOWN)
def test_definitions_ask_and_score_as_lm_eval_own(task: str, folder: Path) -> None:
    import lm_eval
    from datasets import Dataset
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / f"{OWN_DEFINITIONS[task]}.yaml")
    rows = Dataset.from_list([as_published(task, row) for row in questions()[task]])
    for name in ("dataset_path", "dataset_name", "training_split", "validation_split", "test_split"):
        config.pop(name, None)
    config |= {"test_split": "test", "custom_dataset": lambda **metadata: {"test": rows}}
    own = TaskManager(include_defaults=False).load([config])
    ours = finding.open_tasks([task], folder).objects[0]
    theirs = own["tasks"][task]
    for one in (ours, theirs):
        one.set_config(key="num_fewshot", value=0)
        one.build_all_requests()
    assert [instance.args for instance in ours.instances] == [instance.args for instance in theirs.instances]
    answers = [(-1.0 - 0.7 * (number % 3), number % 2 == 0) for number in range(6)]
    for mine, their in zip(ours.eval_docs, theirs.eval_docs, strict=True):
        results = answers[: sum(instance.doc_id == 0 for instance in ours.instances)]
        if ours.OUTPUT_TYPE == "multiple_choice":
            results = answers[: len(ours.doc_to_choice(mine))]
        assert ours.process_results(mine, results) == theirs.process_results(their, results)
    assert ours.aggregation() == theirs.aggregation()
    assert ours.higher_is_better() == theirs.higher_is_better()


def test_an_unfinished_last_sentence_is_set_in_sentence_case() -> None:
    cases = {
        "Roofs: A man sits. he": "Roofs: A man sits. He",
        "Roofs: he": "Roofs: He",
        "Roofs: . a LOGO": "Roofs: . A logo",
        'Roofs: "Sit down!" the man': 'Roofs: "Sit down!" The man',
        "Roofs: a man sits. he stands.": "Roofs: a man sits. he stands.",
        'Roofs: he says "no."': 'Roofs: he says "no."',
    }
    assert {given: in_sentence_case(given) for given in cases} == cases


def test_means_and_what_is_kept(evaluation: Any) -> None:
    dense, pruned = evaluation.models["dense"], evaluation.models["pruned"]
    plain = [metrics["acc"] for metrics in pruned.scores.values()]
    normalised = [metrics.get("acc_norm", metrics["acc"]) for metrics in pruned.scores.values()]
    assert len(plain) == 8
    for metric, scores in (("acc", plain), ("acc_norm", normalised)):
        mean = pruned.means[metric]
        assert mean.value == pytest.approx(sum(score.value for score in scores) / 8)
        assert mean.standard_error == pytest.approx(math.sqrt(sum(score.standard_error**2 for score in scores)) / 8)
        assert pruned.kept[metric] == pytest.approx(mean.value / dense.means[metric].value)
    assert dense.kept == {}
    assert plain != normalised
    assert mean_of([Score(0.5, 0.1), Score(0.25, None)]) == Score(0.375, None)


def test_the_record_is_plain_and_complete(evaluation: Any) -> None:
    record = json.loads(json.dumps(evaluation.to_json()))
    assert list(record) == ["models", "questions", "versions", "protocol"]
    assert record["questions"] == dict.fromkeys(KNOWN, COUNT)
    assert set(record["models"]["pruned"]) == {"folder", "dtype", "scores", "means", "kept", "cut"}
    for part in ("lm-eval 0.4", "all questions", "no examples", "no chat template", "batch 1", "float32", "8 tasks"):
        assert part in record["protocol"]


def test_the_command_shows_errors_means_and_shares(command: Any, models: list[Path], folder: Path) -> None:
    words = ("evaluate", *models, "--tasks", "piqa,winogrande,lambada", "--tasks-dir", folder, "--limit", 2)
    code, out, err = command(*words)
    assert code == 0
    for part in ("piqa", "acc_norm", "perplexity", "±", "mean", "kept", "%", "first 2 questions"):
        assert part in out
    # Nothing of the libraries underneath is seen.
    assert err.strip() == "Reading the questions of piqa, winogrande, lambada_openai."
    assert "bootstrap" not in out
    code, out, _ = command(*words, "--json")
    assert json.loads(out)["questions"] == {"piqa": 2, "winogrande": 2, "lambada_openai": 2}


def test_a_limit_asks_every_model_the_same_first_questions(
    models: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[Any]] = []
    ask = harness._with_progress

    def noted(call: Any, hook: Any, description: str) -> Any:
        def asking(requests: Any, *arguments: Any, **named: Any) -> Any:
            asked.append([request.args for request in requests])
            return ask(call, hook, description)(requests, *arguments, **named)

        return asking

    monkeypatch.setattr(harness, "_with_progress", noted)
    secateur.evaluate_tasks(models, "piqa", tasks_dir=folder, limit=3)
    rows = questions()["piqa"][:3]
    expected = [(f"Question: {row['goal']}\nAnswer:", f" {choice}") for row in rows for choice in row["choices"]]
    assert asked == [expected, expected]


def test_a_progress_bar_counts_every_answer(models: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    counted: dict[str, list[int]] = {}

    @contextmanager
    def progress(description: str, total: int, unit: str) -> Any:
        counted[description] = [total, 0]

        def advance() -> None:
            counted[description][1] += 1

        yield advance

    monkeypatch.setattr(harness, "progress", progress)
    secateur.evaluate_tasks(models[0], "boolq,piqa", tasks_dir=folder)
    assert counted == {"Tasks: dense": [4 * COUNT, 4 * COUNT]}


def test_models_are_in_memory_one_at_a_time(models: list[Path], folder: Path) -> None:
    import weakref

    from secateur.evaluation.tasks import evaluate_tasks

    loaded: list[weakref.ref[Any]] = []

    def load(path: Path) -> Any:
        import gc

        gc.collect()
        assert all(reference() is None for reference in loaded)
        model = tiny_model()
        loaded.append(weakref.ref(model))
        return model

    evaluate_tasks({"a": models[0], "b": models[0]}, "piqa", load=load, folder=folder, limit=1)
    assert len(loaded) == 2


def test_the_dtype_is_the_stored_one(folder: Path, tmp_path: Path) -> None:
    import torch

    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    word_tokenizer().save_pretrained(tmp_path / "half")
    evaluation = secateur.evaluate_tasks(tmp_path / "half", "piqa", tasks_dir=folder, limit=1)
    assert evaluation.models["half"].dtype == "bfloat16"
    assert "bfloat16" in evaluation.protocol


def test_requests_longer_than_the_model_are_counted(folder: Path, tmp_path: Path) -> None:
    short = saved(tmp_path / "short", max_position_embeddings=6)
    evaluation = secateur.evaluate_tasks(short, "piqa,lambada", tasks_dir=folder)
    assert evaluation.models["short"].cut > 0


@pytest.mark.usefixtures("same_process")
def test_a_pruned_model_is_set_beside_the_one_it_came_from(models: list[Path], folder: Path, tmp_path: Path) -> None:
    secateur.prune(str(models[0]), tmp_path / "cut", unit="weight", criterion="magnitude", ratio=0.5)
    evaluation = secateur.evaluate_tasks(tmp_path / "cut", "winogrande", tasks_dir=folder, limit=2)
    assert list(evaluation.models) == ["dense", "cut"]


@pytest.mark.slow
def test_real_questions_give_what_the_command_of_lm_eval_gives(models: list[Path], tmp_path: Path) -> None:
    shared = Path(__file__).parents[3] / "shared" / "data" / "tasks"
    if not shared.is_dir():
        pytest.skip("the real questions are not here")
    names = "boolq,hellaswag,winogrande,arc_challenge"
    ours = secateur.evaluate_tasks(models[0], names, tasks_dir=shared, limit=8)
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={models[0]}", "--tasks", names,
         "--limit", "8", "--include_path", str(DEFINITIONS), "--metadata", json.dumps({"tasks_dir": str(shared)}),
         "--device", "cpu", "--output_path", str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    assert_same(ours.models["dense"].scores, json.loads(file.read_text())["results"])
