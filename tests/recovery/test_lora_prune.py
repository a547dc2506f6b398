"""LoRAPrune: the expected change, whole KV groups, an exact ratio, and a cut that plain transformers loads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from resumable import different
from safetensors.torch import load_file
from tiny_models import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

import secateur
from secateur.errors import RecipeError
from secateur.recovery import RecoverySettings, checkpoints, recover_model
from secateur.recovery.methods.lora_prune import (
    LoRAPruneOptions,
    PruningStudent,
    _Units,
    expected_change,
    ratio_at,
    unit_sums,
)
from secateur.structure import UnitGroup, find_all_units
from secateur.structure.units import Member


def structure_of(model):
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    return find_all_units(skeleton.eval().requires_grad_(False), "model.layers")


def settings(**changes) -> RecoverySettings:
    fields = {"method": "lora-prune:ratio=0.5,every=2", "steps": 10, "batch_size": 2, "held_out": 2}
    return RecoverySettings(**(fields | {"learning_rate": 1e-2} | changes))


def test_the_expected_change_is_that_of_a_step_of_sgd_of_rate_one():
    torch.manual_seed(0)
    lora_A, lora_B = nn.Parameter(torch.randn(3, 7)), nn.Parameter(torch.randn(5, 3))
    before = (lora_B @ lora_A).detach()
    (torch.randn(4, 7) @ (lora_B @ lora_A).T).square().mean().backward()
    found = expected_change(lora_A.detach(), lora_B.detach(), lora_A.grad, lora_B.grad)
    torch.optim.SGD([lora_A, lora_B], lr=1.0).step()
    torch.testing.assert_close(found, -((lora_B @ lora_A).detach() - before), rtol=1e-4, atol=1e-4)


def test_the_schedule_is_cubic_and_exact_in_the_end():
    found = [ratio_at(step, 100, 0.5) for step in range(101)]
    assert found[:11] == [0.0] * 11
    assert found[90:] == [0.5] * 11
    assert found == sorted(found)
    assert found[50] == pytest.approx(0.5 + (0 - 0.5) * (1 - (50 - 10) / (100 - 20)) ** 3)
    assert ratio_at(1, 1, 0.3) == 0.3


def test_a_unit_is_worth_all_it_owns():
    importance_OI = torch.rand(6, 4)
    rows = torch.tensor([[0, 3], [1, 4], [2, 5]])
    for unit, owned in enumerate(rows.tolist()):
        assert float(unit_sums(importance_OI, 0, rows)[unit]) == pytest.approx(float(importance_OI[owned].sum()))
    columns = torch.tensor([[0], [2]])
    torch.testing.assert_close(unit_sums(importance_OI, 1, columns), importance_OI[:, [0, 2]].sum(0))


def test_scores_are_running_means_of_whole_gradients_and_groups_compete_alone(monkeypatch):
    """One head group of the first block, by hand: (Ghat (W + s B A))^2, summed, averaged, in parts of its norm, added up."""
    model, seen = tiny_llama(), []
    real = PruningStudent.before_update

    def looking(self, step, steps):
        base = self.model.get_base_model().model.layers[0].self_attn
        layers = [base.q_proj, base.k_proj, base.v_proj, base.o_proj]
        parts = []
        for layer in layers:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            change = b.grad @ a + b @ a.grad - b.grad @ a.grad
            parts.append((change * (layer.base_layer.weight + 2.0 * b @ a)).square().detach())
        q, k, v, o = parts
        seen.append([torch.stack([part[8 * n * u : 8 * n * (u + 1)].sum() for u in range(4)])
                     for part, n in ((q, 2), (k, 1), (v, 1), (o.T, 2))])  # fmt: skip
        real(self, step, steps)
        heads = next(one for one in self._units if (one.group.kind, one.group.block) == ("head", 0))
        wanted = [sum(0.1 * 0.9 ** (step - 1 - t) * sums[i] for t, sums in enumerate(seen)) for i in range(4)]
        for score_U, by_hand_U in zip(heads.scores, wanted, strict=True):
            torch.testing.assert_close(score_U, by_hand_U, rtol=1e-4, atol=1e-12)
        total = sum(score / (score.norm() + 1e-8) for score in wanted)
        torch.testing.assert_close(heads.total_U(), total, rtol=1e-4, atol=1e-6)
        if step == 9:  # the first step of the last tenth: exact, the lowest two of four groups
            assert sorted((~heads.keep_U).nonzero().squeeze(1).tolist())
            assert int((~heads.keep_U).sum()) == 2

    monkeypatch.setattr(PruningStudent, "before_update", looking)
    ids_NT = torch.randint(128, (8, 16), generator=torch.Generator().manual_seed(3))
    done = recover_model(model, ids_NT, settings(dropout=0.0), structure=structure_of(model))
    assert len(seen) == 10
    counts = {(block, kind): len(units) for block, kind, _, units in done.removed}
    assert counts == {(block, kind): n for block in range(3) for kind, n in (("head", 2), ("channel", 48))}
    for block, kind, _, units in done.removed:
        layer = model.model.layers[block]
        weight = layer.self_attn.o_proj.weight if kind == "head" else layer.mlp.down_proj.weight
        columns = [c for u in units for c in range(16 * u, 16 * u + 16)] if kind == "head" else units
        assert not weight[:, columns].any()
    assert done.held_out_after == pytest.approx(done.looks[-1][1], abs=1e-4)


def test_what_left_stays_gone_whatever_its_scores_become():
    index_UC = np.arange(4)[:, None]
    members = (Member("a.weight", 0, "producer", index_UC), Member("b.weight", 1, "consumer", index_UC))
    layers = {"a.weight": nn.Linear(3, 4), "b.weight": nn.Linear(4, 3)}
    units = _Units(UnitGroup("channel", 0, "", 4, 1, members), "", layers, torch.device("cpu"))
    for score_U in units.scores:
        score_U.copy_(torch.tensor([3.0, 1.0, 2.0, 4.0]))
    units.remove(0.25)
    assert units.keep_U.tolist() == [True, False, True, True]
    for score_U in units.scores:
        score_U.copy_(torch.tensor([3.0, 9.0, 4.0, 2.0]))
    units.remove(0.5)
    assert units.keep_U.tolist() == [True, False, True, False]


def test_the_result_is_cut_loads_in_plain_transformers_and_survives_a_kill(
    llama_folder, windows_file, tmp_path, same_process, monkeypatch
):
    for name in ("recovery.checkpoints.sync_tree", "recovery.checkpoints.sync", "files.sync", "run.sync_tree"):
        monkeypatch.setattr(f"secateur.{name}", lambda path: None)
    monkeypatch.setattr(checkpoints, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "SHARE", 0)
    fields = dict(data=str(windows_file), method="lora-prune:ratio=0.25,every=1", steps=5, learning_rate=1e-3)
    result = secateur.recover(llama_folder, tmp_path / "cut", **fields)
    weights = load_file(tmp_path / "cut" / "model.safetensors")
    for block in range(3):
        prefix = f"model.layers.{block}."
        assert weights[prefix + "self_attn.q_proj.weight"].shape == (48, 64)
        assert weights[prefix + "self_attn.k_proj.weight"].shape == (24, 64)
        assert weights[prefix + "self_attn.o_proj.weight"].shape == (64, 48)
        assert weights[prefix + "mlp.down_proj.weight"].shape == (64, 72)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert plain.config.num_key_value_heads == 3
    ids_NT = load_file(windows_file)["input_ids"]
    with torch.no_grad():
        loss = float(plain(input_ids=ids_NT, labels=ids_NT).loss)
    assert loss < 7
    assert result.record["after"]["parameters"] < result.record["before"]["parameters"]
    assert result.record["model"]["recovered_from"] == str(llama_folder)

    class Died(BaseException):
        pass

    real = PruningStudent.before_update

    def dies(self, step, steps):
        if step == 4:
            raise Died
        real(self, step, steps)

    with monkeypatch.context() as patched:
        patched.setattr(PruningStudent, "before_update", dies)
        with pytest.raises(Died):
            secateur.recover(llama_folder, tmp_path / "out", **fields)
    secateur.recover(llama_folder, tmp_path / "out", **fields)
    assert different(tmp_path / "cut", tmp_path / "out") == []


def test_what_cannot_be_is_refused(llama_folder, windows_file, tmp_path, command):
    words = ["recover", llama_folder, "--out", tmp_path / "out", "--data", windows_file, "--method"]
    code, _, err = command(*words, "lora-prune:ratio=1")
    assert (code, "ratio" in err, "Traceback" in err) == (2, True, False)
    code, _, err = command(*words, "lora-prune", "--patience", 2)
    assert (code, "no --patience" in err, "Traceback" in err) == (2, True, False)
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(RecipeError, match="units"):
        recover_model(tiny_llama(), load_file(windows_file)["input_ids"], settings())
    assert LoRAPruneOptions().ratio == 0.5
