"""Models whose structure cannot be found: one sentence that says what, where and what to do, exit code 2, nothing left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import tiny_llama


def mamba() -> transformers.PreTrainedModel:
    config = transformers.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    return transformers.MambaForCausalLM(config)


def listener() -> transformers.PreTrainedModel:
    config = transformers.WhisperConfig(
        vocab_size=61, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, pad_token_id=0,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=8, num_mel_bins=8,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (mamba, "the operator aten.convolution.default in mixer cannot be followed"),
        (listener, "runs on input_features, not on token ids or pixels"),
    ],
)
def test_the_operator_and_its_module_are_named(
    make: Callable[[], transformers.PreTrainedModel],
    words: str,
    save: Callable[..., Path],
    tmp_path: Path,
    command: Callable[..., tuple[int, str, str]],
) -> None:
    folder = save(make())
    code, out, err = command(
        "prune", folder, "--out", tmp_path / "out", "--unit", "channel", "--criterion", "magnitude"
    )
    said = " ".join(err.split())
    assert code == 2
    assert words in said
    assert "can still be masked" in said
    assert "Traceback" not in said
    assert not out
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_a_cut_that_does_not_prove_is_refused_before_anything_is_written(
    save: Callable[..., Path],
    tmp_path: Path,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A family whose code does something with its heads that no trace can see: the proof finds it."""
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.LlamaAttention.forward

    def with_a_secret(self: torch.nn.Module, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
        result = plain(self, hidden_states, *args, **kwargs)
        return (result[0] * self.o_proj.weight.shape[1], *result[1:])

    folder = save(tiny_llama())
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", with_a_secret)
    code, _, err = command(
        "prune", folder, "--out", tmp_path / "out", "--unit", "head", "--criterion", "magnitude", "--ratio", "0.25"
    )
    said = " ".join(err.split())
    assert code == 2
    assert "head in self_attn could not be proved on a small instance" in said
    assert "logits differ" in said
    assert not (tmp_path / "out").exists()
    code, out, _ = command("inspect", folder, "--prove")
    assert code == 2
    assert "logits differ" in " ".join(out.split())
