"""Variants measured in one walk equal the folders that would be written of them, in plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import tiny
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

import secateur
from secateur.calibration import TokenWindows
from secateur.checkpoint.reader import open_checkpoint
from secateur.errors import CalibrationError, ModelError, SecateurError
from secateur.evaluation import perplexity, variants
from secateur.evaluation.divergence import Tally, log_probabilities, mean_and_error
from secateur.evaluation.variants import Measured, measure_variants
from secateur.plans import load_plan
from secateur.realise import Realisation
from secateur.sweep import SweepSettings

pytestmark = pytest.mark.usefixtures("same_process")

FIELDS: dict[str, dict[str, Any]] = {
    "2:4": dict(criterion="magnitude", unit="2:4"),
    "weight": dict(criterion="random", unit="weight", ratio=0.3, blocks="1:2"),
    "channel": dict(criterion="magnitude", unit="channel", ratio=0.4),
    "head": dict(criterion="magnitude", unit="head", ratio=0.5),
    "uneven": dict(criterion="magnitude", unit="channel", ratio=0.5, blocks="1:2"),
    "block": dict(criterion="random", unit="block", ratio=0.5),
    "hidden": dict(criterion="magnitude", unit="hidden", ratio=0.26),
    "head and 2:4": dict(criterion="magnitude", unit="head,2:4", ratio=0.5),
    "expert": dict(criterion="magnitude", unit="expert", ratio=0.5),
}
EVERYWHERE = ("2:4", "weight", "channel", "block")
FAMILIES = {
    "llama": (*EVERYWHERE, "head", "uneven", "hidden", "head and 2:4"),
    "gpt2": EVERYWHERE,
    "opt": (*EVERYWHERE, "hidden"),
    "bloom": (*EVERYWHERE, "hidden"),
    "gemma2": (*EVERYWHERE, "head", "hidden"),
    "olmo2": (*EVERYWHERE, "head", "hidden"),
    "mixtral": ("2:4", "block", "expert", "hidden"),
    "falcon": EVERYWHERE,
    "cohere": (*EVERYWHERE, "hidden"),
}


def some_windows(vocabulary: int = 96, count: int = 4, length: int = 20) -> TokenWindows:
    generator = torch.Generator().manual_seed(5)
    return TokenWindows(torch.randint(3, vocabulary, (count, length), generator=generator), "some", "some ids")


def settings(scratch: Path, memory: int = 1 << 30, micro_batch: int = 1) -> SweepSettings:
    return SweepSettings(micro_batch, memory, scratch / "scratch")


def planned(folder: Path, place: Path, cases: tuple[str, ...]) -> dict[str, Realisation]:
    """One plan a case, opened as the comparison opens it."""
    checkpoint = open_checkpoint(str(folder))
    found = {}
    for number, case in enumerate(cases):
        secateur.plan(str(folder), place / f"{number}.json", **FIELDS[case])
        found[case] = Realisation(checkpoint, load_plan(place / f"{number}.json"))
    return found


def measured(realisations: dict[str, Realisation], windows: TokenWindows, chosen: SweepSettings) -> Measured:
    checkpoint = next(iter(realisations.values())).checkpoint
    return measure_variants(checkpoint, realisations, windows, chosen)


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def by_hand(dense: Any, other: Any, ids_NT: torch.Tensor) -> tuple[float, float]:
    """KL(dense || other) a token, and the share of equal likeliest tokens, from the probabilities in double precision."""
    with torch.no_grad():
        log_p, log_q = (
            model(input_ids=ids_NT, use_cache=False).logits[:, :-1].double().log_softmax(-1) for model in (dense, other)
        )
    same = log_p.argmax(-1) == log_q.argmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), same.double().mean().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_what_plain_transformers_gives_of_the_written_folders(family, save, tmp_path):
    folder, windows = save(tiny(family)), some_windows()
    realisations = planned(folder, tmp_path, FAMILIES[family])
    found = measured(realisations, windows, settings(tmp_path))
    dense = plain(folder)
    assert found.dense.value == pytest.approx(perplexity(dense, windows).value, rel=1e-5)
    assert found.dense_nonzero_parameters == nonzero(dense)
    for number, (case, realisation) in enumerate(realisations.items()):
        secateur.apply(tmp_path / f"{number}.json", tmp_path / f"out-{number}")
        written, figures = plain(tmp_path / f"out-{number}"), found.variants[case]
        divergence, agreement = by_hand(dense, written, windows.ids_NT)
        assert divergence > 1e-4, f"{case} changes nothing"
        assert figures.perplexity.value == pytest.approx(perplexity(written, windows).value, rel=1e-5), case
        assert figures.divergence == pytest.approx(divergence, abs=1e-6, rel=1e-5), case
        assert figures.agreement == pytest.approx(agreement, abs=1.5 / (4 * 19)), case  # a near-tie may fall either way
        assert figures.nonzero_parameters == nonzero(written), case
        assert realisation.sizes()[1].parameters == sum(p.numel() for p in written.parameters()), case
    assert not list((tmp_path / "scratch").glob("**/*.bin"))


def nonzero(model: Any) -> int:
    return sum(int(p.count_nonzero()) for p in model.parameters())


def test_together_they_are_what_each_is_alone(save, tmp_path):
    folder, windows = save(tiny("llama")), some_windows()
    realisations = planned(folder, tmp_path, FAMILIES["llama"])
    together = measured(realisations, windows, settings(tmp_path))
    for case, realisation in realisations.items():
        alone = measured({case: realisation}, windows, settings(tmp_path))
        assert alone.variants[case] == together.variants[case]
        assert alone.dense == together.dense


@pytest.mark.parametrize("memory", [0, 9000])
def test_what_does_not_fit_goes_to_disk_and_changes_nothing(memory, save, tmp_path, monkeypatch):
    folder, windows = save(tiny("llama")), some_windows()
    realisations = planned(folder, tmp_path, ("2:4", "block", "hidden", "uneven"))
    in_memory = measured(realisations, windows, settings(tmp_path))
    written = []
    original = variants.BoundaryStore._write
    monkeypatch.setattr(variants.BoundaryStore, "_write", lambda *a: (written.append(a[1]), original(*a)))
    assert measured(realisations, windows, settings(tmp_path, memory)) == in_memory
    assert written


def test_a_batch_of_windows_and_small_pieces_change_no_more_than_roundings(save, tmp_path, monkeypatch):
    from secateur.evaluation import divergence

    folder, windows = save(tiny("llama")), some_windows()
    realisations = planned(folder, tmp_path, ("2:4", "block", "hidden"))
    one = measured(realisations, windows, settings(tmp_path))
    monkeypatch.setattr(divergence, "PIECE_NUMBERS", 1)
    three = measured(realisations, windows, settings(tmp_path, micro_batch=3))
    for case, figures in three.variants.items():
        assert figures.perplexity.value == pytest.approx(one.variants[case].perplexity.value, rel=1e-5)
        assert figures.perplexity.standard_error == pytest.approx(
            one.variants[case].perplexity.standard_error, rel=1e-3
        )
        assert figures.divergence == pytest.approx(one.variants[case].divergence, rel=1e-4)
        assert figures.divergence_error == pytest.approx(one.variants[case].divergence_error, rel=1e-3)


def test_a_block_is_read_once_for_all(save, tmp_path, monkeypatch):
    folder, windows = save(tiny_llama()), some_windows(128)
    realisations = planned(folder, tmp_path, ("2:4", "channel", "head", "uneven"))
    checkpoint, read = next(iter(realisations.values())).checkpoint, []
    original = checkpoint.block_tensors
    monkeypatch.setattr(checkpoint, "block_tensors", lambda index: (read.append(index), original(index))[1])
    measured(realisations, windows, settings(tmp_path))
    assert read == [0, 0, 1, 2]  # block 0 once more to learn what it returns


def test_variants_run_no_block_before_the_first_that_they_change(save, tmp_path, monkeypatch):
    folder, windows = save(tiny_llama()), some_windows(128, count=1)
    realisations = planned(folder, tmp_path, ("uneven",))  # changes block 1 of three
    runs = []
    original = variants.BlockCalls.run
    monkeypatch.setattr(variants.BlockCalls, "run", lambda *a: (runs.append(a[2]), original(*a))[1])
    measured(realisations, windows, settings(tmp_path))
    assert sorted(runs) == [0, 1, 1, 2, 2]


def test_the_dense_model_is_untouched_by_what_its_variants_do(save, tmp_path):
    folder, windows = save(tiny("olmo2")), some_windows()
    realisations = planned(folder, tmp_path, ("hidden", "head", "block", "2:4"))
    checkpoint = next(iter(realisations.values())).checkpoint
    before = measure_variants(checkpoint, {}, windows, settings(tmp_path)).dense
    measured(realisations, windows, settings(tmp_path))
    assert measure_variants(checkpoint, {}, windows, settings(tmp_path)).dense == before
    assert not [name for name, p in checkpoint.skeleton.model.named_parameters() if not p.is_meta]
    assert not [m for m in checkpoint.skeleton.model.modules() if "forward" in vars(m)]


def test_weights_that_overflow_are_told_apart_from_an_error(save, tmp_path):
    """Without what holds them down, some weights may overflow; the others are measured all the same."""
    folder, windows = save(tiny("llama")), some_windows()
    realisations = planned(folder, tmp_path, ("2:4", "channel"))

    class Overflowing(Realisation):
        def decision(self, index):
            decision = super().decision(index)
            return _Overflowing(decision.removals, decision.masks, decision.matrices)

    broken = Overflowing(realisations["channel"].checkpoint, realisations["channel"].plan)
    found = measured({"2:4": realisations["2:4"], "channel": broken}, windows, settings(tmp_path))
    assert not found.variants["channel"].is_finite
    assert found.variants["2:4"].is_finite
    assert found.variants["2:4"] == measured(realisations, windows, settings(tmp_path)).variants["2:4"]


class _Overflowing(variants.BlockDecision):
    def in_dense_shapes(self, tensors, in_place=False):
        return {name: tensor * torch.inf for name, tensor in super().in_dense_shapes(tensors, in_place).items()}


def test_a_dense_model_that_is_not_finite_is_refused(save, tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    checkpoint = open_checkpoint(str(save(model)))
    with pytest.raises(SecateurError, match="perplexity on some is infinite"):
        measure_variants(checkpoint, {}, some_windows(), settings(tmp_path))


def test_what_cannot_be_measured_is_refused(save, tmp_path):
    checkpoint = open_checkpoint(str(save(tiny("llama"))))
    with pytest.raises(CalibrationError, match=r"token id 11[0-9]"):
        measure_variants(checkpoint, {}, TokenWindows(torch.arange(110, 120)[None], "some", ""), settings(tmp_path))
    encoder = open_checkpoint(str(save(tiny("bert"), "encoder")))
    with pytest.raises(ModelError, match="not a causal language model"):
        measure_variants(encoder, {}, some_windows(), settings(tmp_path))


def test_log_probabilities_are_those_of_softmax_also_of_strided_logits():
    logits_BTV = torch.randn(2, 7, 50, generator=torch.Generator().manual_seed(0)) * 10
    expected = logits_BTV[:, :-1].double().log_softmax(-1)
    strided = logits_BTV.transpose(1, 2).contiguous().transpose(1, 2)
    for given in (logits_BTV.clone(), strided):
        assert torch.allclose(log_probabilities(given).double(), expected, atol=1e-5)


def test_a_tally_is_zero_for_the_model_itself_and_weighs_windows_alike():
    log_p = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    ids_BT = torch.arange(21).reshape(3, 7) % 8
    tally = Tally()
    tally.add(ids_BT, log_p, log_p)
    assert mean_and_error(tally.divergences) == (0.0, 0.0)
    assert mean_and_error(tally.agreements)[0] == 1.0
    flipped = Tally()
    flipped.add(ids_BT[:1], log_p[:1], log_p[:1].flip(-1))
    flipped.add(ids_BT[1:], log_p[1:], log_p[1:].flip(-1))
    p, q = log_p.double().exp(), log_p.double().flip(-1).exp()
    assert mean_and_error(flipped.divergences)[0] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-6)
    assert mean_and_error(flipped.agreements)[0] == 0.0
    assert mean_and_error(flipped.losses[:1])[1] is None
