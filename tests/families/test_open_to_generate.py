"""Every family from open to generate: units proved, cut, written, loaded by plain transformers; and the table in docs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_configs import FAMILIES
from transformers import AutoModelForCausalLM

import secateur
from secateur.checkpoint.architecture import example_inputs, loader_for
from secateur.checkpoint.skeleton import build_skeleton, load_config
from secateur.proof import prove_all
from secateur.structure import find_all_units

INSIDE = ("head", "query", "expert", "channel")


@pytest.mark.parametrize("name", FAMILIES)
def test_units_are_found_proved_cut_and_loaded(
    name: str,
    save: Callable[..., Path],
    tmp_path: Path,
    record_property: Callable[[str, Any], None],
) -> None:
    family = FAMILIES[name]
    skeleton = build_skeleton(family.make_config())
    structure = find_all_units(skeleton.model, skeleton.blocks_name)
    kinds = {group.kind for group in structure.units}
    assert {"channel", "hidden", "block"} <= kinds
    assert kinds & {"head", "query"}

    proofs = list(prove_all(skeleton, structure))
    assert not [proof for proof in proofs if not proof.holds]
    assert {proof.kind for proof in proofs} == kinds | {"all together"}

    folder = save(family.make_model())
    inside = ",".join(kind for kind in INSIDE if kind in kinds)
    runs = {
        "uneven": dict(unit="head,channel" if "head" in kinds else "channel", ratio=0.3, allocation="global"),
        "uniform": dict(unit=inside, ratio=0.34),
        "whole": dict(unit="hidden,block", ratio=0.34),
    }
    written = {}
    for run, fields in runs.items():
        out = tmp_path / run
        result = secateur.prune(str(folder), out, criterion="magnitude", **fields)
        assert result.record["logits_difference"] < 1e-3
        assert result.record["after"]["parameters"] < result.record["before"]["parameters"]
        written[run] = _written_as(out)
        _check_loaded(out, folder)
    record_property("family", _row(name, skeleton, structure, proofs, written))


def _check_loaded(out: Path, dense: Path) -> None:
    """Load as any user would; cached generation equals generation without a cache."""
    config = load_config(out)
    remote = bool(getattr(config, "auto_map", None))
    loader = AutoModelForCausalLM if remote and "AutoModelForCausalLM" in config.auto_map else loader_for(config)
    model = loader.from_pretrained(out, trust_remote_code=remote, dtype=torch.float32).eval()
    before = sum(tensor.numel() for tensor in secateur.load(dense).parameters())
    assert sum(tensor.numel() for tensor in model.parameters()) < before
    if not model.can_generate():
        with torch.no_grad():
            assert model(**example_inputs(model)).logits.isfinite().all()
        return
    prompt = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(4))
    options = dict(
        max_new_tokens=6, min_new_tokens=6, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    mask = torch.ones_like(prompt)
    cached = model.generate(prompt, attention_mask=mask, use_cache=True, **options)
    plain = model.generate(prompt, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    for one, other in zip(cached.scores, plain.scores, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=1e-3)


def _written_as(out: Path) -> str:
    config = load_config(out)
    if not getattr(config, "auto_map", None):
        return config.architectures[0]
    return "per-layer config" if config.to_dict().get("per_layer_config") else "carved"


def _row(name: str, skeleton: Any, structure: Any, proofs: list[Any], written: dict[str, str]) -> dict[str, Any]:
    native = type(skeleton.model).__name__
    forms = {run: "own config" if form == native else form for run, form in written.items()}
    refused = sorted({f"{refusal.kind}: {refusal.reason}" for refusal in structure.refused})
    found: dict[str, None] = {}
    for group in structure.units:
        found.setdefault(group.kind)
    return {
        "name": name,
        "class": native,
        "units": list(found),
        "proofs": len(proofs),
        "worst": max(proof.difference for proof in proofs),
        "written": forms,
        "refused": refused,
    }
