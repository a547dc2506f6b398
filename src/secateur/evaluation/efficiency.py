"""How large a model is and how fast it runs.

Shape legend: ``B`` batch, ``T`` tokens.
"""

from __future__ import annotations

import inspect
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.checkpoint.architecture import call_model
from secateur.console import track
from secateur.errors import ModelError, SecateurError
from secateur.evaluation.alive import peak_memory
from secateur.evaluation.perplexity import evaluating

DECODE_STEPS = 8
"""Tokens decoded for one measurement."""


@dataclass(frozen=True)
class Size:
    """What a model holds.

    Attributes:
        parameters: numbers in its weights, tied tensors once.
        nonzero_parameters: those that are not zero.
        bytes_on_disk: of its weight files.
        macs_per_token: multiply-accumulates of one forward, a token, head included.
        peak_memory: bytes of weights and of the tensors alive beside them, at most, in the same forward.
    """

    parameters: int
    nonzero_parameters: int
    bytes_on_disk: int
    macs_per_token: int
    peak_memory: int


@dataclass(frozen=True)
class Speed:
    """How long one forward takes, and how many tokens a second that is.

    Attributes:
        latency: median over the repeats, seconds.
        latency_spread: half the distance between the quartiles, seconds: half the repeats lie about this near.
        tokens_per_second: tokens / latency, their median.
        tokens_per_second_spread: the same, in tokens a second.
        tokens: that one forward reads: B × T of a prompt, B of a step of decoding.
        repeats: how often it was measured.
    """

    latency: float
    latency_spread: float
    tokens_per_second: float
    tokens_per_second_spread: float
    tokens: int
    repeats: int


def size_of(model: nn.Module, folder: Path, ids_BT: torch.Tensor) -> Size:
    """Count what ``model``, loaded from ``folder``, holds; MACs are counted on one forward over ``ids_BT``.

    Raises:
        ModelError: the folder holds no weight files.
    """
    weights = list(model.parameters())
    return Size(
        parameters=sum(weight.numel() for weight in weights),
        nonzero_parameters=sum(int(weight.count_nonzero()) for weight in weights),
        bytes_on_disk=bytes_on_disk(folder),
        macs_per_token=macs_per_token(model, ids_BT),
        peak_memory=peak_memory(model, ids_BT),
    )


def bytes_on_disk(folder: Path) -> int:
    """Bytes of the safetensors files a loader would read: those of the index, else all beside the config.

    Raises:
        ModelError: there are none, or one that the index names is missing.
    """
    index = folder / "model.safetensors.index.json"
    try:
        if index.exists():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = [folder / name for name in sorted(names)]
        else:
            files = sorted(folder.glob("*.safetensors"))
        total = sum(file.stat().st_size for file in files)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the weight files of {folder} cannot be counted ({error}); check that all are there"
        ) from error
    if not files:
        raise ModelError(f"{folder} holds no safetensors weights; name the folder of a model")
    return total


def macs_per_token(model: nn.Module, ids_BT: torch.Tensor) -> int:
    """Multiply-accumulates of one forward over ``(B, T)``, a token: every matrix product, attention's included.

    Attention is counted as the full T × T square, so the figure grows with T.
    """
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with evaluating(model), FlopCounterMode(display=False, custom_mapping=fused | _grouped_products()) as counter:
        call_model(model, {"input_ids": ids_BT.to(next(model.parameters()).device)})
    return round(counter.get_total_flops() / 2 / ids_BT.numel())


def measure_speed(
    models: Mapping[str, nn.Module], ids_1T: torch.Tensor, repeats: int = 7, batches: Sequence[int] = (1,)
) -> dict[str, dict[str, Speed]]:
    """Time each model's prefill and decode: a warm-up, then ``repeats`` rounds in which the models take turns.

    Taking turns (A B A B) spreads what else the machine does evenly, so that the models can be compared. Prefill is one
    forward over ``(B, T)`` that fills the cache, decode a step of one token a sequence after it, the mean of ``DECODE_STEPS``.

    Args:
        ids_1T: the prompt, shortened where the model has no positions left after it.
        batches: numbers of sequences at once, each the same prompt.

    Returns:
        of each model, by ``prefill, batch B`` and ``decode, batch B``; no decode where a model keeps no cache.

    Raises:
        SecateurError: no repeats.
    """
    if repeats < 1:
        raise SecateurError(f"speed has to be measured at least once, not {repeats} times")
    prompt_1T = _with_room(models, ids_1T)
    speeds: dict[str, dict[str, Speed]] = {name: {} for name in models}
    for batch in batches:
        ids_BT = prompt_1T.expand(batch, -1).contiguous()
        for model in models.values():
            _timed(model, ids_BT)
        seconds: dict[str, list[tuple[float, float | None]]] = {name: [] for name in models}
        for _ in track(range(repeats), f"Measuring speed, batch {batch}"):
            for name, model in models.items():
                seconds[name].append(_timed(model, ids_BT))
        for name, measured in seconds.items():
            speeds[name][f"prefill, batch {batch}"] = _speed([prefill for prefill, _ in measured], ids_BT.numel())
            steps = [decode for _, decode in measured if decode is not None]
            if steps:
                speeds[name][f"decode, batch {batch}"] = _speed(steps, batch)
    return speeds


def _with_room(models: Mapping[str, nn.Module], ids_1T: torch.Tensor) -> torch.Tensor:
    """As much of the prompt as leaves positions for decoding in every model."""
    room = ids_1T.shape[1]
    for model in models.values():
        config: Any = model.config
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        room = min(room, positions - DECODE_STEPS) if positions else room
    return ids_1T[:, : max(1, room)]


def _timed(model: nn.Module, ids_BT: torch.Tensor) -> tuple[float, float | None]:
    """Seconds of the prefill, and of one step of decoding."""
    device = next(model.parameters()).device
    ids_BT = ids_BT.to(device)
    with evaluating(model):
        _finish(device)
        start = time.perf_counter()
        output = call_model(model, {"input_ids": ids_BT}, cached=True)
        _finish(device)
        prefill = time.perf_counter() - start
        cache = _cache_of(output)
        if cache is None:
            return prefill, None
        # Newer versions of transformers call it by the shorter name.
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        next_B1 = output.logits[:, -1:].argmax(dim=-1)
        start = time.perf_counter()
        for _ in range(DECODE_STEPS):
            output = call_model(model, {"input_ids": next_B1, name: cache}, cached=True)
            cache, next_B1 = _cache_of(output), output.logits[:, -1:].argmax(dim=-1)
        _finish(device)
        return prefill, (time.perf_counter() - start) / DECODE_STEPS


def _cache_of(output: Any) -> Any:
    """What a model remembers of its inputs; None: it keeps nothing."""
    cache = getattr(output, "past_key_values", None)
    return getattr(output, "cache", None) if cache is None else cache


def _finish(device: torch.device) -> None:
    """Wait for an accelerator, which otherwise works on after the call has returned."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _speed(seconds: list[float], tokens: int) -> Speed:
    rates = [tokens / second for second in seconds]
    return Speed(
        latency=statistics.median(seconds),
        latency_spread=_half_quartile_distance(seconds),
        tokens_per_second=statistics.median(rates),
        tokens_per_second_spread=_half_quartile_distance(rates),
        tokens=tokens,
        repeats=len(seconds),
    )


def _half_quartile_distance(values: list[float]) -> float:
    if len(values) == 1:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return (third - first) / 2


def _attention_flops(
    query_shape: Any, key_shape: Any, value_shape: Any, *arguments: Any, out_shape: Any = None, **named: Any
) -> int:
    """Of the fused attention that a CPU uses, which PyTorch's counter does not know: q·k and then the values."""
    *batch_and_heads, queries, width = query_shape
    keys, value_width = key_shape[-2], value_shape[-1]
    return 2 * math.prod(batch_and_heads) * queries * keys * (width + value_width)


def _grouped_products() -> dict[Any, Any]:
    """The operators that multiply each token with its experts' matrices, which PyTorch's counter does not all know."""
    operators = [torch.ops.aten._grouped_mm]
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        operators.append(torch.ops.transformers.grouped_mm_fallback)
    return dict.fromkeys(operators, _grouped_flops)


def _grouped_flops(tokens_shape: Any, experts_shape: Any, *arguments: Any, out_shape: Any = None, **named: Any) -> int:
    """Of tokens ``(S, I)``, one row an expert that a token goes to, with experts ``(E, I, O)``."""
    rows, width = tokens_shape
    return 2 * rows * width * experts_shape[-1]
