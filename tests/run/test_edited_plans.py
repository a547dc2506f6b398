"""Plans whose new weights or notes were changed by hand: refused before anything is written."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur
from secateur.errors import PlanError
from secateur.plans import numbers_beside


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (
            lambda tensors: {name: tensor.double() for name, tensor in tensors.items()},
            "are torch.float64, and the model's are",
        ),
        (lambda tensors: {name: tensor * torch.nan for name, tensor in tensors.items()}, "are not finite"),
        (lambda tensors: {name: tensor[:, 1:].clone() for name, tensor in tensors.items()}, "have the weight's shape"),
        (lambda tensors: dict(list(tensors.items())[1:]), "are not those the plan names"),
        (None, "does not say which new weights of block 1"),
    ],
)
def test_edited_new_weights_are_refused_before_anything_is_written(
    llama_folder, windows_file, edit, sentence, tmp_path
):
    """The digest in the plan is edited to fit."""
    path = tmp_path / "plan.json"
    secateur.plan(str(llama_folder), out=path, criterion="sparsegpt", unit="weight", calibration=str(windows_file))
    content = json.loads(path.read_text())
    digest = None
    if edit is not None:
        file = numbers_beside(path) / "block-0001.safetensors"
        save_file(edit(load_file(file)), file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    content["blocks"][1]["numbers_sha256"] = digest
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=sentence):
        secateur.apply(path, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("notes", [{"allocation": "x"}, {"removal": 3}, {"target": [1]}, {"rounding": {"round_to": 8}}])
def test_notes_that_are_none_are_refused_before_anything_is_written(llama_folder, notes, tmp_path):
    path = tmp_path / "plan.json"
    secateur.plan(str(llama_folder), out=path, criterion="magnitude", unit="weight")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"notes": notes}))
    with pytest.raises(PlanError, match=r"notes of the plan at .* make it again"):
        secateur.apply(path, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
