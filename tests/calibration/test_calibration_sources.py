"""Every form of SOURCE gives the windows that its text says."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from calibration_model import SENTENCES
from safetensors.torch import load_file, save_file

from secateur.calibration import TokenWindows, fingerprint, source, text_windows

REFERENCE = Path(__file__).parents[2].parent / "shared" / "reference"
Opened = Callable[..., TokenWindows]
JOINED = "\n\n".join(SENTENCES)


def written(path: Path, column: str = "text", extra: dict[str, Any] | None = None) -> Path:
    """The sentences in the form that the name of ``path`` says."""
    rows = [{column: sentence, **(extra or {})} for sentence in SENTENCES]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(JOINED)
    return path


def all_windows(path: object, folder: Path) -> torch.Tensor:
    return text_windows(str(path), folder, 8).ids_NT


@pytest.fixture
def expected_NT(tokenizer: Any) -> torch.Tensor:
    ids = tokenizer(JOINED, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // 8 * 8]).view(-1, 8)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.json", "a.parquet", "A.TXT", "with:colon.jsonl"])
def test_every_file_form_gives_the_same_windows(
    name: str, tmp_path: Path, model_folder: Path, expected_NT: torch.Tensor
) -> None:
    assert torch.equal(all_windows(written(tmp_path / name), model_folder), expected_NT)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(
    ("column", "extra", "option"),
    [
        ("text", {"title": "other"}, ""),  # "text" wins
        ("body", {"likes": 3, "tags": ["x"]}, ""),  # the only string
        ("body", {"title": "other"}, ":body"),
        ("body", {"text": "other"}, ":body"),
    ],
)
def test_the_column_is_text_or_the_only_string_or_the_one_named(
    suffix: str, column: str, extra: dict[str, Any], option: str,
    tmp_path: Path, model_folder: Path, expected_NT: torch.Tensor,
) -> None:  # fmt: skip
    path = written(tmp_path / f"a.{suffix}", column, extra)
    assert torch.equal(all_windows(f"{path}{option}", model_folder), expected_NT)


def test_an_existing_file_is_meant_before_a_column(
    tmp_path: Path, model_folder: Path, expected_NT: torch.Tensor
) -> None:
    written(tmp_path / "a.jsonl", extra={"other": "no"})
    odd = written(tmp_path / "b.jsonl").rename(tmp_path / "a.jsonl:other.jsonl")
    assert torch.equal(all_windows(odd, model_folder), expected_NT)


def test_json_may_hold_strings_or_lines_and_nulls_are_passed_over(
    tmp_path: Path, model_folder: Path, expected_NT: torch.Tensor
) -> None:
    strings, lines = tmp_path / "strings.json", tmp_path / "lines.json"
    strings.write_text(json.dumps(SENTENCES))
    lines.write_text("\n".join(json.dumps({"text": text}) for text in [None, *SENTENCES, None]))
    assert torch.equal(all_windows(strings, model_folder), expected_NT)
    assert torch.equal(all_windows(lines, model_folder), expected_NT)


def test_a_byte_order_mark_is_dropped_and_line_ends_are_kept(
    tmp_path: Path, model_folder: Path, tokenizer: Any
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"cut\r\nthe branch\r\n" * 5)
    ids = tokenizer("cut\r\nthe branch\r\n" * 5, add_special_tokens=False)["input_ids"]
    assert all_windows(path, model_folder).flatten().tolist() == ids[: len(ids) // 8 * 8]


def test_python_carries_a_text(opened: Opened, model_folder: Path) -> None:
    windows = opened("python-docs", windows=5, window_length=64)
    assert windows.ids_NT.shape == (5, 64)
    assert "python-docs: 5 of" in windows.description
    assert "drawn with seed 0" in windows.description


@pytest.mark.parametrize("form", ["hub:{}", "hub:{}::train", "hub:{}::train:text", "hub:{}:::text"])
def test_hub_form_reads_a_local_folder(
    form: str, tmp_path: Path, model_folder: Path, expected_NT: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    written(folder / "train.jsonl", extra={"title": "other"})
    assert torch.equal(all_windows(form.format(folder), model_folder), expected_NT)


def test_hub_form_takes_a_split(tmp_path: Path, model_folder: Path, expected_NT: torch.Tensor) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    written(folder / "validation.parquet")
    (folder / "train.parquet").write_bytes((written(tmp_path / "b.parquet", "text")).read_bytes())
    windows = text_windows(f"hub:{folder}::validation", model_folder, 8)
    assert torch.equal(windows.ids_NT, expected_NT)
    assert "split validation" in windows.description


def test_the_hub_is_read_only_as_far_as_needed(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0

    def endless(*parts: object) -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield "A sharp blade."

    monkeypatch.setattr(source, "hub_documents", endless)
    assert opened("hub:endless/text").ids_NT.shape == (3, 8)
    assert taken * 3 < source.SPARE * 3 * 8 * 2


def test_evaluation_takes_the_first_windows_in_order(
    tmp_path: Path, model_folder: Path, expected_NT: torch.Tensor
) -> None:
    path = written(tmp_path / "a.txt")
    assert torch.equal(text_windows(str(path), model_folder, 8, 2).ids_NT, expected_NT[:2])
    assert len(text_windows(str(path), model_folder, 8, 10_000).ids_NT) == len(expected_NT)


def test_calibration_draws_by_the_seed(tmp_path: Path, opened: Opened, expected_NT: torch.Tensor) -> None:
    path = written(tmp_path / "a.txt")
    first, again, other = opened(path), opened(path), opened(path, seed=1)
    assert first.sha256 == again.sha256 != other.sha256
    known = set(map(tuple, expected_NT.tolist()))
    assert set(map(tuple, first.ids_NT.tolist())) <= known
    assert len(set(map(tuple, first.ids_NT.tolist()))) == 3


def test_defaults_are_32_windows_of_256(opened: Opened) -> None:
    assert opened("python-docs", windows=None, window_length=None).ids_NT.shape == (32, 256)


def test_a_long_text_is_no_reason_to_warn(tmp_path: Path, opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    transformers_log = logging.getLogger("transformers")
    propagates, transformers_log.propagate = transformers_log.propagate, True
    try:
        opened(written(tmp_path / "a.txt"))
    finally:
        transformers_log.propagate = propagates
    assert "longer than" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_stored_ids_are_used_as_they_are(dtype: torch.dtype, tmp_path: Path, opened: Opened, bare_folder: Path) -> None:
    ids_NT = torch.randint(0, 40, (6, 10), dtype=dtype)
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": ids_NT, "attention_mask": torch.ones(6, 10)}, path)
    for folder in (bare_folder, tmp_path / "nowhere"):  # neither tokenizer nor model is needed
        whole = opened(path, windows=None, window_length=None, model_folder=folder)
        assert torch.equal(whole.ids_NT, ids_NT.long())
    assert torch.equal(opened(path, windows=4, window_length=10).ids_NT, ids_NT[:4].long())
    assert torch.equal(text_windows(str(path), bare_folder, None, 99).ids_NT, ids_NT.long())


@pytest.mark.skipif(not REFERENCE.exists(), reason="the reference windows are not here")
def test_reference_windows_open(opened: Opened) -> None:
    path = REFERENCE / "calibration-tokens.safetensors"
    windows = opened(path, windows=None, window_length=None, vocabulary=49152)
    assert torch.equal(windows.ids_NT, load_file(path)["input_ids"])
    assert windows.ids_NT.shape == (32, 256)


def test_fingerprints_follow_the_content(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl")
    before = fingerprint(str(path))
    assert before == hashlib.sha256(path.read_bytes()).hexdigest()
    assert fingerprint(f"{path}:text") == f"{before}:text"
    path.write_text(path.read_text() + "\n")
    assert fingerprint(str(path)) != before
    for name in ("self", "python-docs", "hub:allenai/c4:en"):
        assert fingerprint(name) == name


@pytest.fixture
def gemma_folder(tmp_path: Path, model_folder: Path) -> Path:
    """The tiny model under a name that starts with Gemma's: only the text's form follows from it here."""
    folder = tmp_path / "gemma"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gemma3_text"}))
    return folder


def test_windows_of_a_family_lost_without_its_first_token_begin_with_it(
    tmp_path: Path, model_folder: Path, gemma_folder: Path, tokenizer: Any, opened: Opened
) -> None:
    path = written(tmp_path / "a.txt")
    ids = tokenizer(JOINED, add_special_tokens=False)["input_ids"]
    windows = text_windows(str(path), gemma_folder, 8, 3)
    assert windows.beginning == "begun with <s>"
    assert windows.ids_NT.tolist() == [[0, *ids[start : start + 7]] for start in (0, 7, 14)]
    assert text_windows(str(path), model_folder, 8, 3).beginning == "no beginning-of-sequence token"
    drawn_NT = opened(path, model_folder=gemma_folder).ids_NT
    assert drawn_NT[:, 0].tolist() == [0] * 3
    assert drawn_NT[:, 1:].min() > 3
