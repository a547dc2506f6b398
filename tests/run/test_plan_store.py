"""Where a plan's masks lie changes nothing of the plan, and decisions that were made outlast the process."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save

import secateur
from secateur import planstore
from secateur.errors import PlanError
from secateur.plans import Masked, Plan, load_plan
from secateur.recipe import Recipe
from secateur.removal.decision import BlockDecision
from secateur.removal.masks import pack
from secateur.structure import OUTSIDE

BLOCKS = 12
"""More than ten: names are sorted as text, numbers as numbers."""

MODEL = {"spec": "m", "hub_id": None, "architecture": "A", "parameters": 1, "sha256": "0" * 64}


class Crash(BaseException):
    """What no code of ours catches."""


def new_plan(**changes):
    return Plan(model=MODEL | changes, recipe=Recipe(model="m", unit="weight"), calibration=None)


def masks_of(block):
    generator = torch.Generator().manual_seed(block + 5)
    shapes = {"mlp.up": (3, 5), "attn.q": (4, 8), "mlp.experts.down[3]": (2, 9)}
    return {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()}


def decide(plan, blocks=range(BLOCKS)):
    for block in blocks:
        plan.add(block, BlockDecision(masks=masks_of(block)))
    return plan


def saved(plan, folder):
    return [file.read_bytes() for file in plan.save(folder / "plan.json")]


@pytest.mark.parametrize("kept", ["in memory", "in a folder", "moved half way", "last block first", "decided twice"])
def test_where_and_when_masks_are_kept_changes_no_byte(kept, tmp_path):
    expected = saved(decide(new_plan()), tmp_path / "expected")
    plan = new_plan()
    if kept == "in a folder":
        plan = decide(plan.keep_in(tmp_path / "kept"))
    elif kept == "moved half way":
        plan = decide(decide(plan, range(5)).keep_in(tmp_path / "kept"), range(5, BLOCKS))
    elif kept == "last block first":
        plan = decide(plan.keep_in(tmp_path / "kept"), reversed(range(BLOCKS)))
    elif kept == "decided twice":
        plan.add(3, BlockDecision(masks=masks_of(7)))
        plan = decide(plan)
    else:
        plan = decide(plan)
    assert saved(plan, tmp_path / "found") == expected
    assert saved(load_plan(tmp_path / "found"), tmp_path / "again") == expected
    for block in range(BLOCKS):
        for one in (plan, load_plan(tmp_path / "found")):
            found, wanted = one.masks(block), masks_of(block)
            assert list(found) == list(wanted)
            assert all(torch.equal(found[name], mask) for name, mask in wanted.items())
    assert plan.content_digest() == load_plan(tmp_path / "again").content_digest()


def test_the_masks_file_is_what_safetensors_writes(tmp_path):
    plan = decide(new_plan().keep_in(tmp_path / "kept"))
    _, masks = saved(plan, tmp_path / "out")
    bits = {f"{block}.{name}": pack(mask) for block in range(BLOCKS) for name, mask in masks_of(block).items()}
    assert masks == save(dict(sorted(bits.items())))
    assert plan.masks_sha256 == hashlib.sha256(masks).hexdigest()


def test_decisions_are_taken_up_again(tmp_path):
    first = decide(new_plan().keep_in(tmp_path / "kept"), [7, 2])
    first.add(OUTSIDE, BlockDecision())
    again = new_plan().keep_in(tmp_path / "kept")
    assert again.decided() == {7, 2, OUTSIDE}
    assert [entry.block for entry in again.blocks] == [OUTSIDE, 2, 7]
    assert all(torch.equal(again.masks(7)[name], mask) for name, mask in masks_of(7).items())
    decide(again, sorted(set(range(BLOCKS)) - again.decided()))
    whole = decide(new_plan())
    whole.add(OUTSIDE, BlockDecision())
    assert saved(again, tmp_path / "again") == saved(whole, tmp_path / "whole")


def test_decisions_of_another_model_are_not_taken_up(tmp_path):
    decide(new_plan().keep_in(tmp_path / "kept"))
    assert new_plan(sha256="1" * 64).keep_in(tmp_path / "kept").decided() == set()
    assert new_plan().keep_in(tmp_path / "kept").decided() == set(), "they were removed"


@pytest.mark.parametrize("damage", ["truncated", "garbage", "entry", "empty"])
def test_a_damaged_decision_is_made_again(damage, tmp_path):
    decide(new_plan().keep_in(tmp_path / "kept"))
    file = tmp_path / "kept" / "block-0004.safetensors"
    if damage == "entry":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as stream:
            metadata = stream.metadata()
        file.write_bytes(save(load_file(file), metadata | {"entry": '{"block": "x"}'}))
    else:
        content = file.read_bytes()
        file.write_bytes({"truncated": content[:-1], "garbage": content[::-1], "empty": b""}[damage])
    again = new_plan().keep_in(tmp_path / "kept")
    assert again.decided() == set(range(BLOCKS)) - {4}
    assert saved(decide(again, [4]), tmp_path / "a") == saved(decide(new_plan()), tmp_path / "b")


def test_a_crash_while_a_decision_is_kept_leaves_the_others_whole(tmp_path, monkeypatch):
    plan = decide(new_plan().keep_in(tmp_path / "kept"), range(3))

    def crash(*_):
        raise Crash

    for moment in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr("secateur.files.os." + moment, crash)
            with pytest.raises(Crash):
                decide(plan, [3])
        again = new_plan().keep_in(tmp_path / "kept")
        assert again.decided() == {0, 1, 2}
        assert plan.decided() == {0, 1, 2}, "what is not on disk is not said to be decided"


def test_only_the_masks_asked_for_are_read(tmp_path, monkeypatch):
    decide(new_plan()).save(tmp_path / "plan.json")
    read, plain = [], planstore._read
    monkeypatch.setattr(planstore, "_read", lambda file, prefix="": (read.append(prefix), plain(file, prefix))[1])
    plan = load_plan(tmp_path)
    assert plan.zeros()[0] > 0
    assert read == []
    assert sorted(plan.masks(1)) == sorted(masks_of(1)), "block 1 only, not 10 and 11"
    assert read == ["1."]


def test_a_loaded_plan_is_finished(tmp_path):
    decide(new_plan()).save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="is finished; make another"):
        decide(load_plan(tmp_path), [0])
    extended = decide(load_plan(tmp_path).keep_in(tmp_path / "kept"), [0])
    assert len(extended.blocks) == BLOCKS


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda bits: bits.pop("3.mlp.up"), "does not hold the mask of 'mlp.up' in block 3"),
        (
            lambda bits: bits.update({"3.mlp.up": torch.zeros(9, dtype=torch.uint8)}),
            "does not hold the mask of 'mlp.up'",
        ),
        (lambda bits: bits.update({"3.mlp.up": torch.zeros(2)}), "does not hold the mask of 'mlp.up'"),
    ],
)
def test_a_masks_file_that_does_not_fit_is_refused_when_the_plan_is_opened(edit, words, tmp_path):
    decide(new_plan()).save(tmp_path / "plan.json")
    bits = load_file(tmp_path / "masks.safetensors")
    edit(bits)
    content = save(bits)
    (tmp_path / "masks.safetensors").write_bytes(content)
    text = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(text | {"masks_sha256": hashlib.sha256(content).hexdigest()}))
    with pytest.raises(PlanError, match=words):
        load_plan(tmp_path)


def test_masks_that_vanish_are_said_to(tmp_path):
    plan = decide(new_plan().keep_in(tmp_path / "kept"))
    (tmp_path / "kept" / "block-0002.safetensors").unlink()
    with pytest.raises(PlanError, match=r"the mask of 'mlp.up' in block 2 is not what the plan says"):
        plan.save(tmp_path / "plan.json")
    assert not (tmp_path / "plan.json").exists()
    assert not (tmp_path / "masks.safetensors").exists()


def test_bytes_of_a_mask_are_rounded_up():
    assert [Masked(shape=shape, zeros=0).bytes for shape in ((1, 1), (2, 4), (3, 3))] == [1, 1, 2]


def test_a_plan_kept_in_a_folder_is_carried_out_the_same(llama_folder, tmp_path):
    plan = secateur.plan(
        str(llama_folder), tmp_path / "a.json", criterion="magnitude", unit="weight,channel", ratio=0.5
    )
    before = (tmp_path / "a.json").read_bytes(), (tmp_path / "a.masks.safetensors").read_bytes()
    plan.keep_in(tmp_path / "kept").save(tmp_path / "b.json")
    assert before == ((tmp_path / "b.json").read_bytes(), (tmp_path / "b.masks.safetensors").read_bytes())
