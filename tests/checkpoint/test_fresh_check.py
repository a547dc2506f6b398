"""The check in a fresh process: the same logits and the same refusals, whether the model fits in memory or not."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_families import tiny
from tiny_models import tiny_llama, tiny_qwen2

import secateur
from secateur.checkpoint import plain_load, verify
from secateur.checkpoint.architecture import loader_for
from secateur.checkpoint.plain_load import plain_logits
from secateur.checkpoint.verify import compare_logits, float32_bytes, fresh_logits
from secateur.errors import OutputError

IDS_BT = torch.arange(3, 20)[None]

PRUNED = {
    "llama": (lambda: tiny_llama(), dict(unit="channel")),
    "tied": (lambda: tiny_llama(tie_word_embeddings=True), dict(unit="weight")),
    "bfloat16 with biases": (lambda: tiny_qwen2().to(torch.bfloat16), dict(unit="head,channel")),
    "uneven": (lambda: tiny_llama(), dict(unit="channel", blocks="1:3")),
    "carved": (lambda: tiny("gpt2"), dict(unit="head")),
    "packed experts": (lambda: tiny("mixtral"), dict(unit="expert")),
    "packed experts, masked": (lambda: tiny("qwen3_moe"), dict(unit="weight")),
    "looks at weights it does not call": (lambda: tiny("llama4"), dict(unit="weight")),
}


@pytest.fixture
def own_reader(monkeypatch):
    """What the fresh process changes of the loader is undone."""
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", transformers.modeling_utils.safe_open)


def pruned(case, save, tmp_path):
    make, fields = PRUNED[case]
    secateur.prune(str(save(make())), tmp_path / "out", criterion="magnitude", ratio=0.5, **fields)
    return tmp_path / "out"


@pytest.mark.usefixtures("same_process", "own_reader")
@pytest.mark.parametrize("case", PRUNED)
def test_one_module_at_a_time_gives_the_logits_of_the_whole(case, save, tmp_path):
    folder = pruned(case, save, tmp_path)
    remote = case in ("uneven", "carved")
    assert (folder / "modeling_secateur.py").is_file() == remote
    loader = loader_for(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=remote)).__name__
    whole = plain_logits(str(folder), loader, {"input_ids": IDS_BT}, remote)
    found = plain_logits(str(folder), loader, {"input_ids": IDS_BT}, remote, str(tmp_path / "scratch"))
    assert torch.equal(found, whole)
    assert not list((tmp_path / "scratch").glob("*")), "what we write needs no converted copy"


@pytest.mark.usefixtures("own_reader")
def test_weights_stay_on_disk(llama_folder, tmp_path, monkeypatch):
    models, plain = [], plain_load._logits
    monkeypatch.setattr(plain_load, "_logits", lambda model, *a, **k: (models.append(model), plain(model, *a, **k))[1])
    plain_logits(str(llama_folder), "AutoModelForCausalLM", {"input_ids": IDS_BT}, False, str(tmp_path / "scratch"))
    assert all(parameter.is_meta for parameter in models[0].parameters())
    assert not any(buffer.is_meta for buffer in models[0].buffers())


def missing(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def unexpected(tensors):
    tensors["model.layers.1.mlp.other.weight"] = torch.ones(3)


def reshaped(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(95, 64)


@pytest.mark.usefixtures("own_reader")
@pytest.mark.parametrize("scratch", [None, "scratch"])
@pytest.mark.parametrize("damage", [missing, unexpected, reshaped])
def test_both_ways_refuse_what_does_not_fit(damage, scratch, llama_folder, tmp_path):
    tensors = load_file(llama_folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, llama_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"mlp|size mismatch|mismatched"):
        plain_logits(
            str(llama_folder),
            "AutoModelForCausalLM",
            {"input_ids": IDS_BT},
            False,
            str(tmp_path / scratch) if scratch else None,
        )


@pytest.mark.fresh
def test_the_fresh_process_decides_by_size_and_says_why_it_refuses(llama_folder, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="secateur")
    needed = float32_bytes(llama_folder)
    assert needed == sum(tensor.numel() * 4 for tensor in load_file(llama_folder / "model.safetensors").values())
    whole = fresh_logits(llama_folder, IDS_BT, False, limit=needed)
    assert "one module at a time" not in caplog.text
    monkeypatch.setattr(verify, "memory_available", lambda: 2 * needed - 2)
    assert torch.equal(fresh_logits(llama_folder, IDS_BT, False), whole)
    assert "one module at a time" in caplog.text
    wrong = tmp_path / "wrong"
    shutil.copytree(llama_folder, wrong)
    tensors = load_file(wrong / "model.safetensors")
    reshaped(tensors)
    save_file(tensors, wrong / "model.safetensors", {"format": "pt"})
    with pytest.raises(OutputError, match=r"does not load in plain transformers \(.*mismatched_keys: .*up_proj"):
        fresh_logits(wrong, IDS_BT, False, limit=0)


@pytest.mark.fresh
@pytest.mark.usefixtures("same_process")
def test_remote_code_in_a_fresh_process_one_module_at_a_time(save, tmp_path):
    folder = pruned("uneven", save, tmp_path)
    with torch.no_grad():
        expected = secateur.load(folder)(input_ids=IDS_BT).logits
    assert torch.allclose(fresh_logits(folder, IDS_BT, True, limit=0), expected, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_overflows_by_itself_is_not_called_a_wrong_cut(value):
    with pytest.raises(OutputError, match="own logits are not finite"):
        compare_logits(torch.tensor([1.0, value]), torch.zeros(2))
