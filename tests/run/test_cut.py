"""Cut equals masked out, loads in plain transformers, and generates with a cache as without."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_llama, tiny_mistral, tiny_qwen2
from transformers import AutoModelForCausalLM

import secateur
from secateur.structure import find_all_units, mask_tensors

pytestmark = pytest.mark.usefixtures("same_process")

MODELS = {
    "llama, 2 queries a KV head": lambda: tiny_llama(),
    "llama, 4 queries a KV head": lambda: tiny_llama(num_key_value_heads=2),
    "llama, 1 query a KV head": lambda: tiny_llama(num_key_value_heads=8),
    "llama, tied": lambda: tiny_llama(tie_word_embeddings=True),
    "llama, all biases": lambda: tiny_llama(attention_bias=True, mlp_bias=True),
    "qwen2, qkv biases": lambda: tiny_qwen2(),
    "qwen2, tied": lambda: tiny_qwen2(tie_word_embeddings=True, num_key_value_heads=4),
    "mistral, 1 query a KV head": lambda: tiny_mistral(),
    "mistral, sliding window": lambda: tiny_mistral(sliding_window=8),
}


def masked_by_hand(model, plan):
    """The dense model with what the plan removes zeroed where it is read."""
    structure = find_all_units(model, "model.layers")
    for entry in plan.blocks:
        block = model.model.layers[entry.block]
        groups = structure.of_block(entry.block)
        removals = [(next(g for g in groups if g.kind == cut.kind), cut.removed) for cut in entry.cuts]
        block.load_state_dict(mask_tensors(dict(block.state_dict()), removals))
    return model


def logits(model, ids_BT):
    with torch.no_grad():
        return model(input_ids=ids_BT, use_cache=False).logits


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("unit", ["head", "query", "channel", "head,channel", "head,query,channel"])
@pytest.mark.parametrize("ratio", [0.26, 0.5])
def test_cut_equals_masked_out(case, unit, ratio, save, windows_file, windows_NT, tmp_path):
    model = MODELS[case]()
    folder = save(model)
    if "query" in unit and model.config.num_attention_heads == model.config.num_key_value_heads:
        with pytest.raises(secateur.errors.RecipeError, match="query"):
            secateur.plan(str(folder), unit=unit, ratio=ratio, calibration=str(windows_file))
        return
    try:
        plan = secateur.plan(str(folder), tmp_path / "plan.json", unit=unit, ratio=ratio, calibration=str(windows_file))
    except secateur.errors.RecipeError as error:
        if "removes nothing" not in str(error):
            raise
        return
    secateur.apply(tmp_path / "plan.json", tmp_path / "cut")
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())
    expected = logits(masked_by_hand(model, plan), windows_NT)
    assert torch.allclose(logits(cut, windows_NT), expected, atol=2e-5)
    assert (cut.get_input_embeddings().weight is cut.get_output_embeddings().weight) == model.config.tie_word_embeddings


def test_the_llama_trap(save, windows_file, windows_NT, tmp_path):
    """Six of eight heads of hidden 64: no Llama config says it, an equivalent native class does."""
    folder = save(tiny_llama(num_key_value_heads=8))
    secateur.prune(str(folder), tmp_path / "cut", unit="head", ratio=0.25, calibration=str(windows_file))
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert (config["num_attention_heads"], config["head_dim"], config["hidden_size"]) == (6, 8, 64)
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] is None


@pytest.mark.parametrize(
    "fields",
    [
        dict(unit="head,channel", allocation="global", ratio=0.4),
        dict(unit="head,channel", blocks="1:3", ratio=0.5),
    ],
)
def test_uneven_blocks_load_with_the_bundled_file_and_without_remote_code(
    fields, save, windows_file, windows_NT, tmp_path
):
    folder = save(tiny_llama())
    plan = secateur.plan(str(folder), tmp_path / "p.json", calibration=str(windows_file), **fields)
    result = secateur.apply(tmp_path / "p.json", tmp_path / "cut")
    assert result.record["uneven"]
    expected = logits(masked_by_hand(tiny_llama(), plan), windows_NT)
    ours = secateur.load(tmp_path / "cut")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", trust_remote_code=True).eval()
    for model in (ours, plain):
        assert torch.allclose(logits(model, windows_NT), expected, atol=2e-5)
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    cached = ours.generate(windows_NT[:1], use_cache=True, **options)
    assert torch.equal(cached, ours.generate(windows_NT[:1], use_cache=False, **options))


def test_uneven_says_so_and_names_the_nearest_uniform_plan(command, llama_folder, windows_file, tmp_path):
    code, _, err = command(
        "plan", llama_folder, "--out", tmp_path / "p", "--blocks", "1:3", "--ratio", 0.5, "--calibration", windows_file
    )
    assert code == 0
    assert "UNEVEN" in err
    assert "--allocation uniform --unit channel --ratio 0.334" in err


def test_the_nearest_uniform_plan_runs_and_is_uniform(command, save, windows_file, tmp_path):
    import re

    folder = save(tiny_llama(num_attention_heads=6, num_key_value_heads=3, hidden_size=48))
    words = ["plan", folder, "--calibration", windows_file, "--unit", "head"]
    _, _, err = command(*words, "--out", tmp_path / "a", "--ratio", 0.34, "--blocks", "1:2")
    advice = re.search(r"(--allocation uniform --unit head --ratio \S+) on", err)
    code, out, _ = command(*words, "--out", tmp_path / "b", *advice[1].split(), "--json")
    assert code == 0
    assert not json.loads(out)["uneven"]


def test_no_plan_is_recommended_that_stays_uneven(command, llama_folder, windows_file, tmp_path):
    words = ["--unit", "head", "--calibration", windows_file]
    secateur.prune(str(llama_folder), tmp_path / "once", unit="channel", criterion="magnitude", blocks="1:3", ratio=0.5)
    code, _, err = command(
        "plan", tmp_path / "once", *words, "--blocks", "1:2", "--ratio", 0.5, "--out", tmp_path / "p"
    )
    assert code == 0
    _, said, afterwards = err.rpartition("UNEVEN")  # the first run said so too
    assert said
    assert "nearest plan" not in afterwards


@pytest.mark.fresh
def test_a_fresh_process_loads_an_uneven_result(llama_folder, windows_NT, tmp_path):
    from secateur.checkpoint.verify import fresh_logits

    secateur.prune(str(llama_folder), tmp_path / "cut", unit="channel", criterion="magnitude", blocks="1:3", ratio=0.5)
    found = fresh_logits(tmp_path / "cut", windows_NT[:1], remote_code=True)
    assert torch.allclose(found, logits(secateur.load(tmp_path / "cut"), windows_NT[:1]), atol=1e-5)


def test_an_uneven_result_can_be_pruned_again(llama_folder, windows_file, windows_NT, tmp_path):
    fields = dict(calibration=str(windows_file))
    secateur.prune(str(llama_folder), tmp_path / "once", unit="channel", blocks="1:3", ratio=0.25, **fields)
    result = secateur.prune(str(tmp_path / "once"), tmp_path / "twice", unit="2:4", criterion="wanda", **fields)
    assert result.record["after"]["valid_n_of_m"]
    assert result.record["uneven"]
    cut_again = secateur.prune(
        str(tmp_path / "once"), tmp_path / "even", unit="channel", blocks="0:1", ratio=0.25, **fields
    )
    assert not cut_again.record["uneven"], "all blocks have 72 channels now"
    assert torch.isfinite(logits(secateur.load(tmp_path / "twice"), windows_NT)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_stays_and_untouched_weights_keep_their_bits(dtype, save, windows_file, tmp_path):
    from safetensors.torch import load_file

    folder = save(tiny_llama().to(dtype))
    secateur.prune(str(folder), tmp_path / "out", unit="weight", criterion="wanda", calibration=str(windows_file))
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    for name, weight in after.items():
        assert weight.dtype == dtype
        kept = weight != 0
        assert torch.equal(weight[kept], before[name][kept])


def test_shards_are_read_and_several_written(save, windows_file, tmp_path, monkeypatch):
    from secateur.checkpoint import writer

    folder = save(tiny_llama(), max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").is_file()
    monkeypatch.setattr(writer.ShardWriter.__init__, "__defaults__", (150_000,))
    secateur.prune(str(folder), tmp_path / "out", unit="channel", calibration=str(windows_file))
    shards = sorted(f.name for f in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.intermediate_size == 96 - 19


def test_companions_are_carried_over_and_loaders_see_only_weights(llama_folder, windows_file, tmp_path):
    (llama_folder / "tokenizer_config.json").write_text('{"x": 1}')
    (llama_folder / "chat_template.jinja").write_text("{{ messages }}")
    (llama_folder / "LICENSE").write_text("yours")
    (llama_folder / "README.md").write_text("---\nlicense: mit\nbase_model: org/base\n---\n")
    secateur.prune(str(llama_folder), tmp_path / "out", unit="2:4", criterion="wanda", calibration=str(windows_file))
    for name in ("tokenizer_config.json", "chat_template.jinja", "LICENSE", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (llama_folder / name).read_bytes()
    assert [f.name for f in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    from huggingface_hub import ModelCard

    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", "org/base")
    assert "2:4" in card.text
