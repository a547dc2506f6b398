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
