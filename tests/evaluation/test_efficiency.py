from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from evaluation_model import VOCABULARY, saved, tiny_model
from tiny_families import tiny
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from secateur.errors import ModelError, SecateurError
from secateur.evaluation import efficiency
from secateur.evaluation.alive import peak_memory
from secateur.evaluation.efficiency import bytes_on_disk, macs_per_token, measure_speed, size_of

IDS_1T = torch.arange(10)[None]


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_once(tied: bool, tmp_path: Path) -> None:
    folder = saved(tmp_path, tie_word_embeddings=tied)
    model = tiny_model(tie_word_embeddings=tied)
    size = size_of(model, folder, IDS_1T)
    block = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32
    assert size.parameters == 2 * block + 32 + VOCABULARY * 32 * (1 if tied else 2)
    assert size.nonzero_parameters == size.parameters


def test_zeros_are_not_counted(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    size = size_of(model, saved(tmp_path), IDS_1T)
    assert size.parameters - size.nonzero_parameters == 48 * 16


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens", [4, 16])
def test_macs_are_those_of_every_product(attention: str, tokens: int) -> None:
    model = tiny_model(attn_implementation=attention)
    linear = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48) + 32 * VOCABULARY
    scores = 2 * 2 * 4 * 8 * tokens  # blocks; q·k and values; heads × head width; tokens looked at
    measured = macs_per_token(model, torch.zeros(1, tokens, dtype=torch.int64))
    # The rotary angles are a small product too.
    assert measured == pytest.approx(linear + scores, rel=1e-3)


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "eager"])
def test_macs_of_experts_are_those_of_the_two_a_token_goes_to(experts: str) -> None:
    model = tiny("mixtral")
    model.set_experts_implementation(experts)
    tokens, expert, attention = 8, 3 * 32 * 48, 2 * 32 * 32 + 2 * 32 * 16
    scores = 2 * 32 * tokens
    expected = 2 * (attention + scores + 4 * 32 + 2 * expert) + 32 * 96
    measured = macs_per_token(model, torch.zeros(1, tokens, dtype=torch.int64))
    assert measured == pytest.approx(expected, rel=3e-3)


def test_bytes_are_those_of_the_weight_files(tmp_path: Path) -> None:
    folder = saved(tmp_path / "whole")
    expected = (folder / "model.safetensors").stat().st_size
    (folder / "secateur").mkdir()
    (folder / "secateur" / "masks.safetensors").write_bytes(b"x" * 1000)
    assert bytes_on_disk(folder) == expected
    parts = tmp_path / "parts"
    tiny_model().save_pretrained(parts, max_shard_size="20KB")
    (parts / "other.safetensors").write_bytes(b"x" * 1000)
    shards = list(parts.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert bytes_on_disk(parts) == sum(shard.stat().st_size for shard in shards)


def test_missing_weight_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no safetensors weights; name the folder of a model"):
        bytes_on_disk(tmp_path)
    index = {"weight_map": {"a": "gone.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"cannot be counted .*gone.safetensors"):
        bytes_on_disk(tmp_path)


class Named(nn.Module):
    """Says when it is called, and takes a set time on a clock of its own."""

    def __init__(self, name: str, calls: list[str], clock: list[float], seconds: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.config = tiny_model().config
        self.name, self.calls, self.clock, self.seconds = name, calls, clock, iter(seconds)

    def forward(
        self, input_ids: torch.Tensor, use_cache: bool, past_key_values: object = None
    ) -> CausalLMOutputWithPast:
        assert not self.training
        assert not torch.is_grad_enabled()
        assert use_cache
        batch, tokens = input_ids.shape
        if past_key_values is None:
            self.calls.append(f"{self.name}{batch}")
            self.clock[0] += next(self.seconds)
        else:
            assert tokens == 1
            self.clock[0] += 0.5
        return CausalLMOutputWithPast(logits=torch.zeros(batch, tokens, 3), past_key_values=DynamicCache())


def test_models_take_turns_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(efficiency.time, "perf_counter", lambda: clock[0])
    models = {
        "a": Named("a", calls, clock, [99, 1, 2, 3, 4, 5] * 2),
        "b": Named("b", calls, clock, [99, 8, 8, 8, 8, 8] * 2),
    }
    speeds = measure_speed(models, torch.zeros(1, 10, dtype=torch.int64), repeats=5, batches=(1, 2))
    assert calls == ["a1", "b1"] * 6 + ["a2", "b2"] * 6
    assert list(speeds["a"]) == ["prefill, batch 1", "decode, batch 1", "prefill, batch 2", "decode, batch 2"]
    a, b = speeds["a"]["prefill, batch 2"], speeds["b"]["prefill, batch 2"]
    assert (a.latency, a.latency_spread) == (3, 1)  # quartiles 2 and 4
    assert a.tokens_per_second == pytest.approx(20 / 3)
    assert (b.latency, b.latency_spread, b.tokens_per_second) == (8, 0, 2.5)
    assert (b.tokens, b.repeats) == (20, 5)
    decode = speeds["a"]["decode, batch 2"]
    assert (decode.latency, decode.tokens, decode.tokens_per_second) == (0.5, 2, 4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "opt", "falcon", "mixtral"])
def test_real_models_are_timed(family: str) -> None:
    (speed,) = measure_speed({"a": tiny(family)}, IDS_1T, repeats=1, batches=(2,)).values()
    assert list(speed) == ["prefill, batch 2", "decode, batch 2"]
    for timed, tokens in zip(speed.values(), (20, 2), strict=True):
        assert timed.latency > 0
        assert timed.latency_spread == 0
        assert timed.tokens_per_second == pytest.approx(tokens / timed.latency)


def test_the_prompt_leaves_positions_for_decoding() -> None:
    (speed,) = measure_speed({"a": tiny_model(max_position_embeddings=12)}, torch.zeros(1, 12).long(), 1).values()
    assert speed["prefill, batch 1"].tokens == 12 - efficiency.DECODE_STEPS


class Chain(nn.Module):
    config = None

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(10, 64), nn.Linear(64, 256, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        wide = self.second(self.first(input_ids))  # what the look-up gave is gone after this line
        return wide.view(-1)[:4] + 1


def test_peak_memory_is_weights_and_what_is_alive_at_once() -> None:
    assert peak_memory(Chain(), torch.zeros(1, 8, dtype=torch.int64)) == 4 * (640 + 64 * 256) + 4 * 8 * (64 + 256)


def test_no_repeats_are_refused() -> None:
    with pytest.raises(SecateurError, match="at least once"):
        measure_speed({"a": tiny_model()}, IDS_1T, repeats=0)
