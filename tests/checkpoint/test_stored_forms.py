"""Every family: opened a tensor at a time, whatever form it is stored in, and run as transformers runs it."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import ALL, ROUTED_DECODERS, tiny
from tiny_models import tiny_llama

from secateur import loading
from secateur.checkpoint import reader
from secateur.checkpoint.architecture import example_inputs
from secateur.checkpoint.reader import open_checkpoint
from secateur.checkpoint.verify import compare_logits, fresh_logits
from secateur.errors import ModelError
from secateur.sweep import Sweep, SweepSettings
from secateur.sweep.logits import streamed_logits


def rewrite(folder, change):
    """Replace the folder's tensors by what ``change`` makes of them."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name: t.contiguous() for name, t in change(dict(tensors)).items()}, path, {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("family", ALL)
def test_opened_tensors_and_logits_are_the_models(family, save):
    model = tiny(family)
    checkpoint = open_checkpoint(str(save(model)))
    assert type(checkpoint.skeleton.model) is type(model)
    state = model.state_dict()
    assert set(checkpoint.tensors) == set(state) - set(checkpoint.skeleton.tied())
    for index in range(len(checkpoint.skeleton.blocks)):
        tensors = checkpoint.block_tensors(index)
        assert list(tensors) == checkpoint.skeleton.block_names(index)
        prefix = checkpoint.skeleton.block_prefix(index)
        assert all(torch.equal(tensor, state[prefix + name]) for name, tensor in tensors.items())
    outside = checkpoint.read(checkpoint.outer_names())
    assert all(torch.equal(tensor, state[name]) for name, tensor in outside.items())
    inputs = example_inputs(model, batch=2, tokens=12)
    with torch.no_grad():
        expected = model(**inputs).logits
    assert torch.allclose(streamed_logits(checkpoint, inputs), expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ALL)
def test_tensors_under_the_models_own_names_load_in_plain_transformers(family, save, tmp_path):
    """What is written has the names the model runs with, fused where it runs fused."""
    model = tiny(family)
    checkpoint = open_checkpoint(str(save(model)))
    model.config.save_pretrained(tmp_path / "own")
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.read(checkpoint.tensors).items()}
    save_file(tensors, tmp_path / "own" / "model.safetensors", {"format": "pt"})
    loaded, report = type(model).from_pretrained(tmp_path / "own", output_loading_info=True)
    assert not any(report.values()), report
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert open_checkpoint(str(tmp_path / "own")).content_hash == checkpoint.content_hash


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_block_is_read_without_its_neighbours(family, save, monkeypatch):
    checkpoint = open_checkpoint(str(save(tiny(family))))
    seen = []
    get = reader._Files.get
    monkeypatch.setattr(reader._Files, "get", lambda files, place: seen.append(place.stored_name) or get(files, place))
    checkpoint.block_tensors(1)
    assert seen
    assert all(name.startswith("model.layers.1.") for name in seen)


@pytest.mark.parametrize("family", ["bert", "vit", "mixtral"])
def test_a_fresh_process_loads_what_an_ordinary_user_would(family, save):
    model = tiny(family)
    folder = save(model)
    inputs = example_inputs(model, tokens=8)
    assert (
        compare_logits(streamed_logits(open_checkpoint(str(folder)), inputs), fresh_logits(folder, inputs, False))
        < 1e-5
    )
    assert type(loading.load(folder)) is type(model)


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not any(n in name for n in names)}


def with_nan(name):
    def change(tensors):
        tensors[name][0, 0] = float("nan")
        return tensors

    return change


ONE = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
W1 = [f"model.layers.1.block_sparse_moe.experts.{expert}.w1.weight" for expert in range(4)]
W2 = [name.replace("w1", "w2") for name in W1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without(ONE), rf"{W1[0]}' with 6 more.*cannot be joined into 'model.layers.1.mlp.experts.gate_up_proj'"),
        (without(*W1), r"w3.weight' with 3 more .* cannot be joined into 'model.layers.1.mlp.experts.gate_up_proj'"),
        (without(W2[3]), rf"{W2[0]}' with 2 more .* has shape \[3, 32, 48\], but the config asks for \[4, 32, 48\]"),
        (without(*W2), r"asks for the weight 'model.layers.1.block_sparse_moe.experts.\*.w2.weight', which .* not hold"),
        (lambda tensors: tensors | {"model.layers.2.input_layernorm.weight": torch.ones(32)}, "no place for"),
        (lambda tensors: tensors | {ONE: torch.ones(48, 32, dtype=torch.int8)}, f"'{ONE}' .* is stored as int8"),
    ],
)  # fmt: skip
def test_damage_is_told_by_the_stored_names(change, sentence, save):
    folder = rewrite(save(tiny("mixtral")), change)
    with pytest.raises(ModelError, match=sentence):
        open_checkpoint(folder)


def test_nan_is_told_by_the_stored_name(save):
    checkpoint = open_checkpoint(rewrite(save(tiny("mixtral")), with_nan(ONE)))
    with pytest.raises(ModelError, match=f"the weight '{ONE}' .* holds NaN"):
        _ = checkpoint.content_hash


def test_old_gpt2_files_have_no_prefix_and_hold_masks(save):
    model = tiny("gpt2")

    def older(tensors):
        bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        masks = {f"h.{block}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8) for block in range(2)}
        return bare | masks | {f"h.{block}.attn.masked_bias": torch.tensor(-1e4) for block in range(2)}

    checkpoint = open_checkpoint(rewrite(save(model), older))
    tensors = checkpoint.read(checkpoint.tensors)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in tensors.items())
    assert "transformer.h.0.attn.c_attn.weight" in tensors


def test_old_bert_files_hold_other_heads_and_indices(save, caplog):
    model = tiny("bert")

    def older(tensors):
        named = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in tensors.items()
        }
        pooler = {"bert.pooler.dense.weight": torch.ones(32, 32), "cls.seq_relationship.weight": torch.ones(2, 32)}
        return named | pooler | {"bert.embeddings.position_ids": torch.arange(64)[None]}

    with caplog.at_level(logging.WARNING):
        checkpoint = open_checkpoint(rewrite(save(model), older))
    assert "2 stored weights belong to a head that BertForMaskedLM does not have" in caplog.text
    tensors = checkpoint.read(checkpoint.tensors)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in tensors.items())


def test_either_name_of_a_tie_may_be_stored(save):
    model = tiny_llama(tie_word_embeddings=True)

    def other_name(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        return tensors

    checkpoint = open_checkpoint(rewrite(save(model), other_name))
    assert torch.equal(
        checkpoint.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"], model.lm_head.weight
    )


def test_a_class_that_transformers_does_not_have(save):
    folder = save(tiny("vit"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["ViTForPoetry"]}))
    with pytest.raises(ModelError, match="no class 'ViTForPoetry' and no causal language model of type 'vit'"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_only_causal_models_are_calibrated(family, save, tmp_path, windows_NT):
    checkpoint = open_checkpoint(str(save(tiny(family))))
    with pytest.raises(ModelError, match="is not a causal language model"):
        Sweep(checkpoint, windows_NT, SweepSettings(1, 0, tmp_path / "s"))


def test_modules_may_be_patched_and_tensors_outside_changed(save):
    """A block made the identity and a changed head are what the logits come from, and the patch is still there after."""
    model = tiny("gpt2")
    checkpoint = open_checkpoint(str(save(model)))
    block = checkpoint.skeleton.blocks[0]
    inputs = example_inputs(model, tokens=8)
    norm = "transformer.ln_f.weight"

    def identity(hidden_states, *args, **kwargs):
        return hidden_states

    block.forward = identity
    found = streamed_logits(checkpoint, inputs, change_outside=lambda tensors: {norm: tensors[norm] * 2})
    assert block.forward is identity
    model.transformer.h = torch.nn.ModuleList([model.transformer.h[1]])
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(2)
        expected = model(**inputs).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_every_routed_family_but_one_is_stored_apart(save):
    """What the tests above rest on."""
    apart = [
        name
        for name in ROUTED_DECODERS
        if any(".experts.0." in key for key in load_file(save(tiny(name), name) / "model.safetensors"))
    ]
    assert len(apart) >= 5
