"""A plan that was edited into something that cannot be meant is refused, not half carried out."""

from __future__ import annotations

import json

import pytest

import secateur
from secateur.errors import PlanError
from secateur.plans import load_plan


@pytest.mark.parametrize(
    ("edit", "words"), [("twice", "names block 1 twice"), ("outside", "takes channel from block -1")]
)
def test_entries_that_cannot_be_meant_are_refused(edit, words, llama_folder, tmp_path):
    file = tmp_path / "plan.json"
    secateur.plan(str(llama_folder), file, criterion="magnitude", unit="channel", ratio=0.25)
    content = json.loads(file.read_text())
    entry = next(entry for entry in content["blocks"] if entry["block"] == 1)
    if edit == "twice":
        content["blocks"].append(entry)
    else:
        entry["block"] = -1
    file.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=words):
        load_plan(file)


def test_a_plan_that_removes_nothing_is_not_carried_out(llama_folder, tmp_path):
    file = tmp_path / "plan.json"
    secateur.plan(str(llama_folder), file, criterion="magnitude", unit="channel", ratio=0.25)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"blocks": []}))
    with pytest.raises(PlanError, match="removes nothing"):
        secateur.apply(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda entry, cut: entry.update(block=9), r"names block 9, and the model has 0 to 2"),
        (
            lambda entry, cut: cut.update(kind="expert"),
            r"cuts 'expert' units in block 1, where the model has: .*channel",
        ),
        (lambda entry, cut: cut.update(module="self_attn"), r"of 'self_attn' in block 1, where they are of 'mlp'"),
        (lambda entry, cut: cut.update(count=47), r"cuts from 47 channel units in block 1, and the model has \d+"),
        (lambda entry, cut: cut.update(removed=[999]), r"names channel unit 999 in block 1 of 0 to"),
        (lambda entry, cut: cut.update(removed=[3, 3]), r"names channel unit 3 in block 1 twice"),
        (lambda entry, cut: cut.update(removed=list(range(cut["count"]))), r"without a single channel in block 1"),
    ],
)
def test_a_refusal_names_the_file_the_place_and_the_next_step(edit, words, llama_folder, tmp_path):
    file = tmp_path / "edited.json"
    secateur.plan(str(llama_folder), file, criterion="magnitude", unit="channel", ratio=0.25)
    content = json.loads(file.read_text())
    entry = next(entry for entry in content["blocks"] if entry["block"] == 1)
    edit(entry, entry["cuts"][0])
    file.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=words) as refusal:
        secateur.apply(file, tmp_path / "out")
    assert "edited.json" in str(refusal.value)
    assert any(step in str(refusal.value) for step in ("make the plan again", "keep at least one"))
    assert not (tmp_path / "out").exists()
