"""What was written once is a model like any other: it is proved, pruned again, and loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from family_configs import FAMILIES

import secateur


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
