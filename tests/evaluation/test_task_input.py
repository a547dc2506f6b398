"""Questions, task files and flags that cannot be used: one sentence with file and line, exit code 2, before any model is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_model import saved
from task_questions import questions, written

import secateur
from secateur.errors import TaskError
from secateur.evaluation.tasks import local


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "dense")


def changed(**fields: Any) -> str:
    """A row of piqa with other fields; None leaves one out."""
    row = questions()["piqa"][0] | fields
    return json.dumps({key: value for key, value in row.items() if value is not None})


GOOD = changed()
BAD_LINES = {
    "cut off": (GOOD[:-9], r"line 3 is not whole JSON; the file looks cut off, get it again"),
    "in the middle": (GOOD[:-9] + "\n" + GOOD, r"line 3 is not whole JSON; mend or remove that line"),
    "no object": ("[1]", r"line 3 is not an object with the columns of 'piqa': 'goal', 'choices', 'label'"),
    "a column missing": (changed(label=None), r"line 3 has no 'label'; a question of 'piqa' has .* this one 'goal', 'choices'"),
    "other columns": ('{"a": 1}', r"line 3 has no 'goal', 'choices', 'label'.* this one 'a'"),
    "label too large": (changed(label=2), r"line 3 has the label 2, and choices from 0 to 1"),
    "label negative": (changed(label=-1), r"line 3 has the label -1"),
    "label of text": (changed(label="1"), r"line 3 has the label '1'; it has to be the index"),
    "label of a truth": (changed(label=True), r"line 3 has the label True"),
    "too many choices": (changed(choices=["a", "b", "c"]), r"line 3 has 3 choices; there have to be 2"),
    "choices of text": (changed(choices="ab"), r"line 3 has 'choices' that are not a list"),
    "an empty choice": (changed(choices=["a", ""]), r"line 3 has 'choices' that are not a list of strings, none of them empty"),
    "text of numbers": (changed(goal=3), r"line 3 has a 'goal' that is not text"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named(case: str, tmp_path: Path) -> None:
    line, sentence = BAD_LINES[case]
    file = tmp_path / "piqa_val.jsonl"
    file.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(TaskError, match=sentence) as raised:
        local.questions("piqa", tmp_path)
    assert str(raised.value).startswith(f"{file}, line 3")


def test_other_shapes(tmp_path: Path) -> None:
    shapes = {
        "winogrande": ({"sentence": "no gap", "choices": ["a", "b"], "label": 0}, "without a gap"),
        "lambada_openai": ({"text": "word "}, "'text' of one word"),
        "boolq": ({"passage": "p", "question": "q", "label": 2}, "label 2, and choices from 0 to 1"),
        "arc_easy": ({"question": "q", "choices": ["a"], "label": 0}, "1 choices; there have to be two or more"),
    }
    for task, (row, sentence) in shapes.items():
        written(tmp_path, {task: [row]})
        with pytest.raises(TaskError, match=f"line 1 .*{sentence}"):
            local.questions(task, tmp_path)
    (tmp_path / "boolq_val.jsonl").write_text('{"passage": "p", "question": "q", "answer": true}\n')
    assert local.questions("boolq", tmp_path) == [{"passage": "p", "question": "q", "label": 1}]
    (tmp_path / "boolq_val.jsonl").write_text("\n")
    with pytest.raises(TaskError, match="holds no questions"):
        local.questions("boolq", tmp_path)
    (tmp_path / "boolq_val.jsonl").write_bytes(b'\xff\xfe{"passage"')
    with pytest.raises(TaskError, match="line 1 is not UTF-8"):
        local.questions("boolq", tmp_path)


FLAGS = {
    "unknown task": (["--tasks", "piqa,hellaswaggle", "--tasks-dir", "FOLDER"], "no task 'hellaswaggle'; did you mean hellaswag"),
    "no task": (["--tasks", " , ", "--tasks-dir", "FOLDER"], "names no task"),
    "no file": (["--tasks", "piqa,boolq", "--tasks-dir", "FOLDER"], "no questions of 'boolq', boolq_val.jsonl or boolq.jsonl; it has piqa"),
    "no folder": (["--tasks", "piqa", "--tasks-dir", "nowhere"], "no folder nowhere"),
    "limit 0": (["--tasks", "piqa", "--tasks-dir", "FOLDER", "--limit", "0"], "--limit has to be at least 1, not 0"),
    "batch 0": (["--tasks", "piqa", "--tasks-dir", "FOLDER", "--batch-size", "0"], "--batch-size has to be at least 1"),
    "limit alone": (["--limit", "3"], "--limit belongs to --tasks"),
    "folder alone": (["--tasks-dir", "FOLDER"], "--tasks-dir belongs to --tasks"),
}  # fmt: skip


@pytest.mark.parametrize("case", FLAGS)
def test_bad_flags(case: str, command: Any, model: Path, tmp_path: Path) -> None:
    words, sentence = FLAGS[case]
    folder = written(tmp_path / "tasks", {name: questions()[name] for name in ("piqa", "hellaswag")})
    code, out, err = command("evaluate", model, *[folder if word == "FOLDER" else word for word in words], "--json")
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert sentence in err.strip().splitlines()[-1]


TASK = """
task: mine
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{goal}}}}"
doc_to_target: label
doc_to_choice: {choice}
"""


def own(folder: Path, choice: str = "choices", more: str = "") -> Path:
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text(f"{GOOD}\n" * 3)
    (folder / "mine.yaml").write_text(TASK.format(file=rows, choice=choice) + more)
    return folder


def test_a_task_file_of_the_users_own(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    evaluation = secateur.evaluate_tasks(model, "mine", tasks_dir=own(tmp_path / "own"), limit=2)
    assert evaluation.questions == {"mine": 2}
    assert {"acc", "acc_norm"} == set(evaluation.models["dense"].scores["mine"])


def test_code_that_a_task_file_names_runs_only_when_trusted(model: Path, tmp_path: Path) -> None:
    folder = own(tmp_path / "own", "!function helper.choices")
    (folder / "helper.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n\n\ndef choices(document):\n    return document['choices']\n"
    )
    with pytest.raises(TaskError, match=r"mine.yaml, line 11 names Python code.*--trust-remote-code"):
        secateur.evaluate_tasks(model, "mine", tasks_dir=folder)
    (folder / "other.yaml").write_text("include: mine.yaml\ntask: other\n")
    (folder / "mine.yaml").rename(folder / "base.yml")
    (folder / "other.yaml").write_text("include: base.yml\ntask: other\n")
    with pytest.raises(TaskError, match=r"base.yml, line 11 names Python code"):
        secateur.evaluate_tasks(model, "other", tasks_dir=folder)
    assert not (tmp_path / "ran").exists()
    secateur.evaluate_tasks(model, "other", tasks_dir=folder, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_templates_reach_no_code(model: Path, tmp_path: Path) -> None:
    escape = "\"{{ ''.__class__.__mro__[1].__subclasses__()[:2] | list | string }}\""
    folder = own(tmp_path / "own", escape)
    with pytest.raises(TaskError, match=r"'mine' cannot be had as .*mine.yaml says .*unsafe"):
        secateur.evaluate_tasks(model, "mine", tasks_dir=folder)


def test_a_damaged_task_file_is_named(model: Path, tmp_path: Path) -> None:
    folder = own(tmp_path / "own", more="metric_list: [\n")
    with pytest.raises(TaskError, match=r"mine.yaml, line \d+ is not YAML"):
        secateur.evaluate_tasks(model, "mine", tasks_dir=folder)
    (folder / "mine.yaml").write_text("just words")
    with pytest.raises(TaskError, match=r"mine.yaml is not a task file"):
        secateur.evaluate_tasks(model, "mine", tasks_dir=folder)


def test_nothing_is_fetched_offline(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    from lm_eval.tasks import TaskManager

    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("something reached for the network")

    # lm-eval's own definition of one task, without reading the thousands of others.
    begin = TaskManager.__init__
    import lm_eval.tasks

    piqa = Path(lm_eval.tasks.__file__).parent / "piqa"
    monkeypatch.setattr(TaskManager, "__init__", lambda self: begin(self, include_path=piqa, include_defaults=False))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TaskError, match=r"'piqa' cannot be had .*HF_HUB_OFFLINE is set.*--tasks-dir FOLDER"):
        secateur.evaluate_tasks(model, "piqa")
    with pytest.raises(TaskError, match="there is no task 'piqaa'; did you mean piqa"):
        secateur.evaluate_tasks(model, "piqaa")
