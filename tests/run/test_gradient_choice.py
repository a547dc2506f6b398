"""``--gradient`` from the recipe to the plan: defaults, refusals, what is kept and what is not used again."""

from __future__ import annotations

import json

import pytest
import torch

import secateur
from secateur.errors import RecipeError
from secateur.recipe import recipe_from
from secateur.sweep import Sweep


@pytest.mark.parametrize(
    ("criterion", "given", "resolved"),
    [
        ("taylor", {}, ("exact", None, None)),
        ("gblm:gradient_only=true", {}, ("exact", None, None)),
        ("fms", {}, ("forward", 16, 1e-3)),
        ("fms", {"gradient": "exact"}, ("exact", None, None)),
        ("fms", {"queries": 4, "perturbation": 0.01}, ("forward", 4, 0.01)),
        ("taylor", {"gradient": "forward", "queries": 3}, ("forward", 3, 1e-3)),
        ("wanda", {}, (None, None, None)),
    ],
)
def test_what_is_left_out_is_as_published(criterion, given, resolved):
    recipe = recipe_from(model="m", criterion=criterion, **given)
    assert (recipe.gradient, recipe.queries, recipe.perturbation) == resolved


def test_a_recipe_round_trips(tmp_path):
    for given in ({"criterion": "fms", "perturbation": 0.1}, {"gradient": "block"}, {"criterion": "random"}):
        recipe = recipe_from(model="m", **given)
        (tmp_path / "r.yaml").write_text(recipe.to_yaml())
        assert recipe_from(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"criterion": "wanda", "gradient": "block"}, "wanda needs no gradients; leave --gradient block out"),
        ({"criterion": "magnitude", "gradient": "exact"}, "magnitude needs no gradients"),
        ({"criterion": "wanda", "queries": 3}, "--queries is about --gradient forward"),
        ({"criterion": "taylor", "queries": 3}, "--queries is about --gradient forward"),
        ({"gradient": "block", "perturbation": 0.1}, "--perturbation is about --gradient forward"),
        ({"gradient": "backward"}, "--gradient cannot be 'backward'"),
        ({"gradient": "forward", "queries": 0}, "--queries cannot be '0'"),
        ({"gradient": "forward", "perturbation": 0}, "--perturbation cannot be '0'"),
        ({"gradient": "forward", "perturbation": float("inf")}, "--perturbation cannot be 'inf'"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, sentence):
    with pytest.raises(RecipeError, match=sentence):
        recipe_from(model="m", **fields)


@pytest.mark.parametrize("source", ["exact", "block", "forward"])
def test_the_command_line(source, command, llama_folder, windows_file, tmp_path):
    words = ["--criterion", "fms", "--unit", "head,channel", "--ratio", "0.5", "--calibration", windows_file]
    words += ["--queries", "2", "--perturbation", "0.01"] if source == "forward" else []
    code, _, err = command("plan", llama_folder, "--out", tmp_path / "p.json", "--gradient", source, *words)
    assert code == 0, err
    recipe = json.loads((tmp_path / "p.json").read_text())["recipe"]
    assert (recipe["gradient"], recipe["queries"]) == (source, 2 if source == "forward" else None)


def test_a_refusal_is_one_sentence_and_exit_2(command, llama_folder, tmp_path):
    words = ["--criterion", "wanda", "--gradient", "exact"]
    code, _, err = command("plan", llama_folder, "--out", tmp_path / "p.json", *words)
    assert code == 2
    assert "wanda needs no gradients; leave --gradient exact out" in err
    assert "Traceback" not in err


@pytest.fixture
def sweeps(monkeypatch) -> list[str]:
    """The sweeps that run, by name."""
    ran: list[str] = []
    for name in ("dense", "pruned"):
        original = getattr(Sweep, name)
        monkeypatch.setattr(Sweep, name, lambda self, *a, n=name, o=original, **k: (ran.append(n), o(self, *a, **k))[1])
    return ran


def masks(folder, windows_file, **fields) -> dict[str, torch.Tensor]:
    fields = {"criterion": "taylor", "unit": "weight", "ratio": 0.5} | fields
    plan = secateur.plan(str(folder), calibration=str(windows_file), **fields)
    return {f"{e.block}.{name}": mask for e in plan.blocks for name, mask in plan.masks(e.block).items()}


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_scores_of_one_source_are_not_taken_for_anothers(llama_folder, windows_file, sweeps):
    fields = {"gradient": "forward", "queries": 2}
    changes = [{}, {"queries": 3}, {"perturbation": 0.01}, {"seed": 1}, {"blocks": "0:2"}]
    found = [masks(llama_folder, windows_file, **(fields | change)) for change in changes]
    found += [masks(llama_folder, windows_file, gradient=source) for source in ("exact", "block")]
    assert len(sweeps) == len(found), "each is another score"
    assert not any(same(left, right) for i, left in enumerate(found) for right in found[:i])
    assert same(found[0], masks(llama_folder, windows_file, **fields))
    assert len(sweeps) == len(found), "the same again is read"


def test_estimated_gradients_are_kept_for_pruned_propagation_and_block_local_ones_are_not(
    llama_folder, windows_file, sweeps
):
    for source, again in (("forward", ["dense", "pruned", "pruned"]), ("block", ["pruned", "pruned"])):
        sweeps.clear()
        few = {"queries": 2} if source == "forward" else {}
        for ratio in (0.3, 0.6):
            masks(llama_folder, windows_file, criterion="gblm", gradient=source, ratio=ratio, **few)
        assert sweeps == again


def test_a_damaged_part_of_kept_forward_scores_is_made_again_alike(llama_folder, windows_file, tmp_path):
    """All matrices in range move at once, so one block cannot be measured alone."""
    fields = {"gradient": "forward", "queries": 2}
    before = masks(llama_folder, windows_file, **fields)
    for file in (tmp_path / "cache").rglob("block-0001.safetensors"):
        file.write_bytes(b"damaged")
    assert same(before, masks(llama_folder, windows_file, **fields))


def test_the_seed_changes_only_what_is_drawn(llama_folder, windows_file):
    for source in ("exact", "block"):
        one, two = (masks(llama_folder, windows_file, gradient=source, seed=seed) for seed in (0, 1))
        assert same(one, two)


def test_block_local_gradients_follow_the_pruned_blocks(llama_folder, windows_file):
    """Block 0 sees the same either way; the blocks after it do not."""
    fields = {"criterion": "gblm:gradient_only=true", "gradient": "block", "ratio": 0.6}
    dense, pruned = (masks(llama_folder, windows_file, propagate=p, **fields) for p in ("dense", "pruned"))
    first = [name for name in dense if name.startswith("0.")]
    assert first
    assert all(torch.equal(dense[name], pruned[name]) for name in first)
    assert not same(dense, pruned)
