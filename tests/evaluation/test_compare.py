from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_model import VOCABULARY, saved, tiny_model
from rich.console import Console

from secateur.calibration import text_windows
from secateur.errors import CalibrationError, ModelError, SecateurError
from secateur.evaluation import Evaluation, evaluate, perplexity


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    words = torch.randint(3, VOCABULARY, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{word}" for word in words))
    return str(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {"dense": saved(base / "a"), "pruned": saved(base / "b", seed=1, intermediate_size=24)}


def measured(folders: dict[str, Path], text: str, **settings: Any) -> Evaluation:
    return evaluate(folders, text=text, **({"window_length": 16, "max_windows": 4, "repeats": 2} | settings))


def drawn(evaluation: Evaluation, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(evaluation.table())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_every_model_is_measured_on_the_same_windows(folders: dict[str, Path], text: str) -> None:
    evaluation = measured(folders, text)
    windows = text_windows(text, folders["dense"], 16, 4)
    assert evaluation.windows_sha256 == windows.sha256
    assert evaluation.models["dense"].perplexity == perplexity(tiny_model(), windows)
    assert evaluation.models["pruned"].perplexity == perplexity(tiny_model(1, intermediate_size=24), windows)
    dense, pruned = evaluation.models["dense"].size, evaluation.models["pruned"].size
    assert dense.parameters - pruned.parameters == dense.macs_per_token - pruned.macs_per_token == 2 * 3 * 32 * 24
    assert pruned.bytes_on_disk == (folders["pruned"] / "model.safetensors").stat().st_size


def test_json_is_plain_and_complete(folders: dict[str, Path], text: str) -> None:
    evaluation = measured(folders, text)
    content = json.loads(json.dumps(evaluation.to_json()))
    assert list(content) == ["models", "protocol", "text", "windows_sha256", "continuations"]
    assert list(content["models"]) == ["dense", "pruned"]
    assert content["models"]["dense"]["perplexity"]["value"] == evaluation.models["dense"].perplexity.value
    assert set(content["models"]["pruned"]) == {"folder", "perplexity", "size", "speed", "divergence"}


def test_the_table_has_a_row_for_each_figure_and_ratios_to_the_first(folders: dict[str, Path], text: str) -> None:
    evaluation = measured(folders, text)
    shown = drawn(evaluation)
    for label in (
        "perplexity", "parameters", "parameters not zero", "weights on disk", "MACs per token",
        "peak memory", "prefill, batch 1", "decode, batch 8", "tokens/s, prefill, batch 8", "tokens/s, decode, batch 1",
    ):  # fmt: skip
        assert label in shown
    models = evaluation.models
    ratio = models["pruned"].perplexity.value / models["dense"].perplexity.value
    row = next(line for line in shown.splitlines() if line.lstrip().startswith("perplexity"))
    assert f"{models['dense'].perplexity.value:.2f}" in row
    assert f"{ratio:.2f}×" in row


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_the_table_fits_100_columns(count: int, folders: dict[str, Path], text: str) -> None:
    many = {f"model {i}": folders["dense"] for i in range(count)}
    shown = drawn(measured(many, text), width=200)
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 100
    assert shown.splitlines()[1].count("ratio") == (count - 1 if count <= 3 else 0)


def test_the_protocol_is_said(folders: dict[str, Path], text: str) -> None:
    protocol = measured(folders, text).protocol
    for part in (
        f"{text}: first 4 windows of 500 tokens",
        "context 16, stride 16, 60 tokens",
        "float32",
        "median of 2",
    ):
        assert part in protocol
    assert protocol.count("context 16") == 1
    assert "Speed" not in measured(folders, text, speed=False).protocol


def test_without_speed_models_are_in_memory_one_at_a_time(folders: dict[str, Path], text: str) -> None:
    import weakref

    loaded: list[weakref.ref[Any]] = []

    def load(folder: Path) -> Any:
        assert all(reference() is None for reference in loaded)
        model = tiny_model()
        loaded.append(weakref.ref(model))
        return model

    evaluation = measured(folders, text, speed=False, load=load)
    assert len(loaded) == 2
    assert evaluation.models["dense"].speed is None
    assert "prefill" not in drawn(evaluation)


def test_defaults_are_said_in_the_protocol(folders: dict[str, Path]) -> None:
    evaluation = evaluate({"dense": folders["dense"]}, max_windows=1, speed=False)
    assert evaluation.text == "python-docs"
    assert "python-docs: first 1 windows" in evaluation.protocol
    assert "context 512" in evaluation.protocol


def test_what_cannot_be_evaluated_is_refused(folders: dict[str, Path], text: str, tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="there is no model to evaluate"):
        evaluate({})
    with pytest.raises(CalibrationError, match="no tokenizer"):
        measured({"nowhere": tmp_path / "nowhere"}, text)
    with pytest.raises(ModelError, match="nowhere"):
        measured({**folders, "lost": tmp_path / "nowhere"}, text)
    with pytest.raises(CalibrationError, match="'self' is no text"):
        measured(folders, "self")


def test_predictions_are_compared_with_those_of_the_first(folders: dict[str, Path], text: str) -> None:
    evaluation = measured(folders, text)
    assert evaluation.models["dense"].divergence is None
    ids_NT = text_windows(text, folders["dense"], 16, 4).ids_NT
    with torch.no_grad():
        dense_NMV = tiny_model()(ids_NT).logits[:, :-1].double().log_softmax(-1)
        pruned_NMV = tiny_model(1, intermediate_size=24)(ids_NT).logits[:, :-1].double().log_softmax(-1)
    kl_N = (dense_NMV.exp() * (dense_NMV - pruned_NMV)).sum(-1).mean(-1)
    divergence = evaluation.models["pruned"].divergence
    assert divergence is not None
    assert divergence.value == pytest.approx(kl_N.mean().item(), rel=1e-5)
    assert divergence.standard_error == pytest.approx(kl_N.std().item() / 2, rel=1e-4)
    same = (dense_NMV.argmax(-1) == pruned_NMV.argmax(-1)).double().mean().item()
    assert divergence.agreement == pytest.approx(same)
    shown = drawn(evaluation)
    assert f"{divergence.value:.4f} ± {divergence.standard_error:.4f}" in shown
    assert f"{divergence.agreement:.1%}" in shown
    assert "KL(dense || model)" in evaluation.protocol
    same_model = measured({"a": folders["dense"], "b": folders["dense"]}, text).models["b"].divergence
    assert same_model is not None
    assert (same_model.value, same_model.agreement) == (0, 1)


def test_another_tokenizer_has_nothing_to_compare(
    folders: dict[str, Path], text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = saved(tmp_path / "other")
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"w3"', '"v3"'))
    evaluation = measured({"dense": folders["dense"], "other": other}, text)
    assert evaluation.models["other"].divergence is None
    assert "KL" not in evaluation.protocol + drawn(evaluation)
    assert "other has another tokenizer than dense" in caplog.text
