"""Instruction rows: the published prompt, whatever file they lie in, and the model's end token behind every answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from secateur.calibration.documents import row_documents
from secateur.calibration.instructions import instruction_text
from secateur.errors import CalibrationError

ROWS: list[dict[str, Any]] = [
    {"instruction": "Add them.", "input": "2 and 3", "output": "5"},
    {"instruction": "Say hello.", "input": "", "output": "Hello."},
    {"instruction": "Say {braces}.", "output": "{braces}"},
]
WANTED = [
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\nAdd them.\n\n### Input:\n2 and 3\n\n### Response:\n5",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nSay hello.\n\n### Response:\nHello.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nSay {braces}.\n\n### Response:\n{braces}",
]


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    file = folder / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif name.endswith("jsonl"):
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        file.write_text(json.dumps(rows))
    return file


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_rows_become_the_published_prompt_with_its_answer(name, tmp_path):
    assert list(row_documents(written(tmp_path, name, ROWS), None)) == WANTED
    assert list(row_documents(tmp_path / name, None, "</s>")) == [text + "</s>" for text in WANTED]
    assert list(row_documents(tmp_path / name, "output", "</s>")) == ["5", "Hello.", "{braces}"]


@pytest.mark.parametrize("name", ["a.json", "a.parquet"])
def test_a_column_called_text_is_read_as_it_stands(name, tmp_path):
    rows = [row | {"text": "whole"} for row in ROWS[:2]]
    assert list(row_documents(written(tmp_path, name, rows), None, "</s>")) == ["whole", "whole"]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [({"instruction": "a", "output": None}, "no 'output'"), ({"instruction": 3, "output": "a"}, "'instruction' that is not a string but int"),
     ({"instruction": "a", "output": "b", "input": ["c"]}, "'input' that is not a string but list")],
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_named(row, sentence, tmp_path):
    with pytest.raises(CalibrationError, match=r"row 3 of .*; mend or remove that row") as error:
        list(row_documents(written(tmp_path, "a.jsonl", [*ROWS[:2], row]), None))
    assert sentence in str(error.value)
    with pytest.raises(CalibrationError):
        instruction_text(row, "row 1")


def test_windows_hold_the_end_token_and_the_whole_text(opened, tokenizer, tmp_path):
    file = written(tmp_path, "a.jsonl", ROWS)
    ids = tokenizer("\n\n".join(text + tokenizer.eos_token for text in WANTED), add_special_tokens=False)["input_ids"]
    found = opened(str(file), windows=len(ids) // 8, window_length=8)
    assert found.ids_NT.flatten().tolist() == ids[: len(ids) // 8 * 8]
    assert ids.count(tokenizer.eos_token_id) == 3
