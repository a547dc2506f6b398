"""Whatever cannot be used is refused in one sentence that says what, where and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from secateur.calibration import TokenWindows, fingerprint, text_windows
from secateur.errors import CalibrationError

Opened = Callable[..., TokenWindows]
LONG = "The gardener cuts the old branches. " * 40


def ids(tensor: Any, key: str = "input_ids") -> Callable[[Path], None]:
    return lambda path: save_file({key: tensor}, path)


def cut_short(path: Path) -> None:
    save_file({"input_ids": torch.zeros(64, 64, dtype=torch.int64)}, path)
    path.write_bytes(path.read_bytes()[:-100])


def text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content)  # type: ignore[func-returns-value, return-value]


def rows(*content: Any) -> Callable[[Path], None]:
    return text("\n".join(map(json.dumps, content)))


def parquet(**columns: list[Any]) -> Callable[[Path], None]:
    return lambda path: pyarrow.parquet.write_table(pyarrow.table(columns), path)


GOOD_IDS = torch.zeros(4, 8, dtype=torch.int64)

FILES = {
    "empty text": ("a.txt", text(""), "", {}, "a.txt holds no text; name one with at least a few thousand words"),
    "blank text": ("a.md", text(" \n\n\t"), "", {}, "a.md holds no text"),
    "no rows": ("a.jsonl", text("\n"), "", {}, "a.jsonl holds no text"),
    "only nulls": ("a.jsonl", rows({"text": None}), "", {}, "a.jsonl holds no text"),
    "no parquet rows": ("a.parquet", parquet(text=pyarrow.array([], pyarrow.string())), "", {}, "holds no text"),
    "short": ("a.txt", text("cut it"), "", {"window_length": 64}, "fewer than one window of 64; give a shorter --window-length or more text"),
    "few windows": ("a.txt", text(LONG), "", {"windows": 1000}, "not the 1000 asked for; give --windows"),
    "not UTF-8": ("a.txt", lambda path: path.write_bytes(b"caf\xe9 " * 20), "", {}, "a.txt is not UTF-8 text (byte 3"),
    "rows not UTF-8": ("a.jsonl", lambda path: path.write_bytes(b'{"text": "caf\xe9"}'), "", {}, "is not UTF-8"),
    "bad line": ("a.jsonl", text('{"text": "a"}\n{"text": '), "", {}, "line 2 of"),
    "bad array": ("a.json", text('[{"text": "a"}, '), "", {}, "a.json is not JSON"),
    "deep array": ("a.json", text("[" * 100_000), "", {}, "a.json is not JSON"),
    "deep line": ("a.jsonl", text("[" * 100_000), "", {}, "line 1 of"),
    "numbers": ("a.json", text("[1, 2]"), "", {}, "row 1 of"),
    "unclear column": ("a.jsonl", rows({"a": "x", "b": "y"}), "", {}, "a.jsonl:COLUMN (there are: a, b)"),
    "no strings": ("a.jsonl", rows({"a": 1}), "", {}, "(there are: a)"),
    "unknown column": ("a.jsonl", rows({"a": "x", "b": "y"}), ":c", {}, "has no column 'c'; it has a, b"),
    "unknown parquet column": ("a.parquet", parquet(a=["x"], b=["y"]), ":c", {}, "has no column 'c'; it has a, b"),
    "unclear parquet column": ("a.parquet", parquet(a=["x"], b=["y"]), "", {}, "a.parquet:COLUMN (there are: a, b)"),
    "number column": ("a.parquet", parquet(a=["x"], b=[1]), ":b", {}, "has a 'b' that is not a string but int"),
    "row without": ("a.jsonl", rows({"text": "x"}, {"body": "y"}), "", {}, "row 2 of"),
    "column of a text": ("a.txt", text(LONG), ":text", {}, "names a column, which only .jsonl, .json and .parquet have"),
    "empty column": ("a.jsonl", rows({"text": "x"}), ":", {}, "names a column"),
    "not parquet": ("a.parquet", text("no"), "", {}, "a.parquet is not a readable Parquet file"),
    "unknown kind": ("a.csv", text(LONG), "", {}, "a.csv is of a kind that is not read; give one of .txt, .md"),
    "pickle": ("a.pt", text(LONG), "", {}, "a.pt is of a kind that is not read"),
    "truncated ids": ("a.safetensors", cut_short, "", {}, "is not a readable safetensors file"),
    "text as ids": ("a.safetensors", text(LONG), "", {}, "is not a readable safetensors file"),
    "other key": ("a.safetensors", ids(GOOD_IDS, "tokens"), "", {}, "has no tensor 'input_ids' (it holds tokens)"),
    "float ids": ("a.safetensors", ids(GOOD_IDS.float()), "", {}, "is float32; token ids have to be integers"),
    "flat ids": ("a.safetensors", ids(GOOD_IDS.flatten()), "", {}, "has shape (32,); it has to be (windows, tokens)"),
    "no windows": ("a.safetensors", ids(GOOD_IDS[:0]), "", {}, "has shape (0, 8)"),
    "one token": ("a.safetensors", ids(GOOD_IDS[:, :1].contiguous()), "", {}, "at least 2 tokens a window"),
    "too many asked": ("a.safetensors", ids(GOOD_IDS), "", {"windows": 5}, "holds 4 windows, not the 5 asked for; give --windows 4"),
    "other length": ("a.safetensors", ids(GOOD_IDS), "", {"window_length": 16}, "have 8 tokens, not 16; leave --window-length out"),
    "foreign ids": ("a.safetensors", ids(GOOD_IDS + 10**6), "", {}, "token id 1000000 (window 0, position 0), outside"),
    "no count": ("a.txt", text(LONG), "", {"windows": 0}, "--windows has to be at least 1, not 0"),
    "no length": ("a.txt", text(LONG), "", {"window_length": 1}, "--window-length has to be at least 2"),
}  # fmt: skip


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(CalibrationError) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert not sentence.endswith(".")
    return sentence


def test_at_most_as_many_as_there_are(tmp_path: Path, opened: Opened) -> None:
    (tmp_path / "a.txt").write_text(LONG)
    few = opened(tmp_path / "a.txt", windows=1000, at_most=True)
    assert 0 < len(few.ids_NT) < 1000
    assert f"{len(few.ids_NT)} of {len(few.ids_NT)} windows" in few.description
    (tmp_path / "b.txt").write_text("no")
    assert "fewer than one window" in refused(lambda: opened(tmp_path / "b.txt", windows=1000, at_most=True))


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_used(case: str, tmp_path: Path, opened: Opened) -> None:
    name, make, column, settings, expected = FILES[case]
    make(tmp_path / name)
    sentence = refused(lambda: opened(f"{tmp_path / name}{column}", **settings))
    assert expected in sentence
    if "has to be at least" not in expected:
        assert name in sentence


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("selfs", "there is no text 'selfs'; did you mean 'self'?"),
        ("missing.txt", "there is no file missing.txt"),
        ("missing.jsonl:text", "there is no file missing.jsonl"),
        ("hub:", "is not of the form hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]"),
        ("hub:a:b:c:d:e", "is not of the form hub:NAME"),
        ("hub:pandas", "'pandas' is a file format, not a dataset"),
    ],
)
def test_a_source_that_is_not_there(
    source: str, expected: str, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in refused(lambda: opened(source))


def test_a_folder_is_not_a_file(tmp_path: Path, opened: Opened) -> None:
    assert f"or hub:{tmp_path}" in refused(lambda: opened(tmp_path))


@pytest.mark.parametrize("name", ["{}", "{}:none", "{}::test", "{}::train:body", "{}/nowhere"])
def test_a_dataset_that_cannot_be_read(name: str, tmp_path: Path, opened: Opened) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": LONG}))
    sentence = refused(lambda: opened(f"hub:{name.format(tmp_path)}", windows=10**6))
    if name == "{}":
        assert "not the 1000000 asked for" in sentence
    else:
        assert f"the dataset '{name.format(tmp_path).split(':')[0]}'" in sentence


def test_a_dataset_on_the_hub_without_a_connection(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
        monkeypatch.setattr(module, True)
    sentence = refused(lambda: opened("hub:nobody/nothing-at-all"))
    assert "split 'train' of the dataset 'nobody/nothing-at-all' cannot be read" in sentence


def test_text_needs_a_tokenizer(bare_folder: Path, opened: Opened) -> None:
    sentence = refused(lambda: opened("python-docs", model_folder=bare_folder))
    assert f"{bare_folder} has no tokenizer that loads" in sentence
    assert "safetensors file holding input_ids" in sentence


def test_nothing_is_evaluated_on_what_it_wrote(model_folder: Path) -> None:
    assert "'self' is no text to evaluate on" in refused(lambda: text_windows("self", model_folder))
    assert "--max-windows" in refused(lambda: text_windows("python-docs", model_folder, max_windows=0))


def test_fingerprint_of_nothing(tmp_path: Path) -> None:
    assert "there is no file" in refused(lambda: fingerprint(str(tmp_path / "a.txt")))
