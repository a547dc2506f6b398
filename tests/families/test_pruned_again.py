"""What was written once is a model like any other: it is proved, pruned again, and loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from family_configs import FAMILIES

import secateur
from secateur.checkpoint.skeleton import REMOTE_CLASS, build_skeleton
from secateur.errors import ModelError


@pytest.mark.parametrize(
    ("family", "first", "then"),
    [
        ("BLOOM", {"unit": "head", "ratio": 0.25}, {"unit": "head", "ratio": 0.34}),  # slopes of slopes
        ("GPT-2", {"unit": "head", "ratio": 0.25}, {"unit": "hidden,block", "ratio": 0.34}),
        ("Llama", {"unit": "head,channel", "ratio": 0.3, "allocation": "global"}, {"unit": "block", "ratio": 0.34}),
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
