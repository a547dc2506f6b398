"""What was written once is a model like any other: it is proved, pruned again, and loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from family_configs import FAMILIES

import secateur
from secateur.checkpoint.reader import open_checkpoint
from secateur.checkpoint.skeleton import REMOTE_CLASS, build_skeleton
from secateur.errors import ModelError


@pytest.mark.parametrize(
    ("family", "first", "then"),
    [
        ("BLOOM", {"unit": "head", "ratio": 0.25}, {"unit": "head", "ratio": 0.34}),  # slopes of slopes
        ("GPT-2", {"unit": "head", "ratio": 0.25}, {"unit": "hidden,block", "ratio": 0.34}),
        ("Llama", {"unit": "head,channel", "ratio": 0.3, "allocation": "global"}, {"unit": "block", "ratio": 0.34}),
        ("Llama", {"unit": "head,channel", "ratio": 0.3, "allocation": "global"}, {"unit": "hidden", "ratio": 0.25}),
        ("Gemma 2", {"unit": "hidden", "ratio": 0.25}, {"unit": "query,channel", "ratio": 0.34}),
    ],
)
def test_a_result_can_be_pruned_again(
    family: str,
    first: dict[str, Any],
    then: dict[str, Any],
    save: Callable[..., Path],
    tmp_path: Path,
    same_process: None,
) -> None:
    folder = save(FAMILIES[family].make_model())
    once = secateur.prune(str(folder), tmp_path / "once", criterion="magnitude", **first)
    twice = secateur.prune(str(tmp_path / "once"), tmp_path / "twice", criterion="magnitude", **then)
    assert twice.record["logits_difference"] < 1e-3
    assert twice.record["after"]["parameters"] < once.record["after"]["parameters"]
    loaded = secateur.load(tmp_path / "twice")
    assert sum(p.numel() for p in loaded.parameters()) == twice.record["after"]["parameters"]


@pytest.mark.parametrize("attributes", [{"num_heads": "3"}, {"forward": 3}, {"nothing_of_that_name": 3}])
def test_a_carved_record_that_says_no_size_is_refused(
    attributes: dict[str, Any], save: Callable[..., Path], tmp_path: Path
) -> None:
    config = FAMILIES["GPT-2"].make_config()
    config.architectures = ["GPT2LMHeadModel"]
    config.auto_map = {"AutoModelForCausalLM": REMOTE_CLASS}
    config.carved = {"attributes": {"transformer.h.0.attn": attributes}}
    with pytest.raises(ModelError, match=r"carved record gives transformer\.h\.0\.attn"):
        build_skeleton(config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda carved: next(iter(carved["attributes"].values())).update(split_size=40), "do not fit together"),
        (lambda carved: next(iter(carved["attributes"].values())).update(num_heads=0), "greater than or equal to 1"),
        (lambda carved: carved["shapes"].update({"transformer.h.0.attn.nothing": [3]}), "does not have"),
        (lambda carved: carved["shapes"].update({"transformer.h.9.attn.c_attn.weight": [3]}), "does not have"),
        (lambda carved: carved.update(shapes=[1, 2]), "carved.shapes"),
        (lambda carved: carved.update(more={}), "carved.more"),
    ],
)
def test_a_carved_record_that_was_edited_is_blamed_before_anything_runs(
    change: Callable[[dict[str, Any]], Any], words: str, save: Callable[..., Path], tmp_path: Path, same_process: None
) -> None:
    folder, out = save(FAMILIES["GPT-2"].make_model()), tmp_path / "out"
    secateur.prune(str(folder), out, criterion="magnitude", unit="head", ratio=0.25)
    config = json.loads((out / "config.json").read_text())
    change(config["carved"])
    (out / "config.json").write_text(json.dumps(config))
    for use in (lambda: open_checkpoint(str(out)), lambda: secateur.load(out)):
        with pytest.raises(ModelError, match=words) as refusal:
            use()
        assert "config" in str(refusal.value)
        assert "carved" in str(refusal.value)


@pytest.mark.parametrize(
    ("family", "task", "loader", "processor"),
    [
        ("BERT", "fill-mask", "AutoModelForMaskedLM", "AutoTokenizer"),
        ("ViT", "image-classification", "AutoModelForImageClassification", "AutoImageProcessor"),
        ("Llama", "text-generation", "AutoModelForCausalLM", "AutoTokenizer"),
    ],
)
def test_the_card_says_the_class_that_loads_it(
    family: str, task: str, loader: str, processor: str, save: Callable[..., Path], tmp_path: Path, same_process: None
) -> None:
    folder, out = save(FAMILIES[family].make_model()), tmp_path / "out"
    result = secateur.prune(str(folder), out, criterion="magnitude", unit="channel", ratio=0.25)
    card = (out / "README.md").read_text()
    assert f"pipeline_tag: {task}\n" in card
    assert f"import {loader}, {processor}\n" in card
    assert (
        sum(p.numel() for p in getattr(transformers, loader).from_pretrained(out).parameters())
        == (result.record["after"]["parameters"])
    )
