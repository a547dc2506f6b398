"""Perplexity as the pruning papers measure it: windows that do not overlap, each on its own.

Shape legend: ``N`` windows, ``B`` of them at once, ``T`` tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from secateur.calibration import TokenWindows
from secateur.checkpoint.architecture import call_model, is_causal
from secateur.console import track
from secateur.errors import SecateurError
from secateur.evaluation.divergence import Divergence, Tally, log_probabilities


@dataclass(frozen=True)
class Perplexity:
    """Perplexity and what it was measured on.

    Attributes:
        value: exp of the mean next-token cross-entropy over all targets.
        standard_error: of ``value``, from the spread between windows; None for a single window.
        tokens: targets predicted, N × (T - 1).
        windows: N.
        context: T, which is also the stride.
        protocol: all of this, for people.
    """

    value: float
    standard_error: float | None
    tokens: int
    windows: int
    context: int
    protocol: str


def perplexity(model: nn.Module, windows: TokenWindows, batch_size: int = 1) -> Perplexity:
    """Measure ``model`` on windows ``(N, T)``; the logits of one batch are the most that is held at once.

    Raises:
        CalibrationError: a token id is outside the model's vocabulary.
        SecateurError: the model does not predict the next token, the result is not finite, or the windows are longer than the model's positions reach.
    """
    return side_by_side({"": model}, windows, batch_size)[""][0]


def side_by_side(
    models: Mapping[str, nn.Module], windows: TokenWindows, batch_size: int = 1, alike: Collection[str] = ()
) -> dict[str, tuple[Perplexity, Divergence | None]]:
    """Measure models on the same windows ``(N, T)``, batch by batch in turn; the logits of two are the most that is held.

    Args:
        models: by name; the first is the dense one.
        alike: those whose token ids mean what the first's do, which are compared with its predictions.

    Raises:
        CalibrationError, SecateurError: as ``perplexity``, by the first model that it is true of.
    """
    for model in models.values():
        if not is_causal(model.config):
            raise SecateurError(
                f"{type(model).__name__} is not a causal language model, so it has no perplexity; evaluate a model that writes text"
            )
        windows.check_vocabulary(vocabulary_of(model))
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in models}
    tallies = {name: Tally() for name in models}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
        for ids_BT in track(windows.ids_NT.split(batch_size), "Measuring perplexity"):
            dense_BMV = None
            for number, (name, model) in enumerate(models.items()):
                logits_BTV = _logits(model, ids_BT)
                losses[name].append(_window_losses(logits_BTV, ids_BT).cpu())
                if number == 0 and alike:
                    dense_BMV = log_probabilities(logits_BTV)
                elif dense_BMV is not None and name in alike:
                    tallies[name].add(ids_BT, dense_BMV, log_probabilities(logits_BTV).to(dense_BMV.device))
    figures = {}
    for name, model in models.items():
        measured = perplexity_of(torch.cat(losses[name]), windows, next(model.parameters()).dtype)
        if not math.isfinite(measured.value):
            raise not_finite(measured, windows)
        figures[name] = measured, tallies[name].divergence() if tallies[name].divergences else None
    return figures


def perplexity_of(losses_N: torch.Tensor, windows: TokenWindows, dtype: torch.dtype) -> Perplexity:
    """The perplexity that the mean cross-entropies ``(N,)`` of ``windows`` come to; infinite or NaN where they do.

    Args:
        dtype: of the numbers that the model was computed with.
    """
    count, context = windows.ids_NT.shape
    mean = losses_N.mean().item()
    value = math.exp(mean) if mean < 700 else mean if math.isnan(mean) else math.inf
    spread = None if count == 1 else value * losses_N.std().item() / math.sqrt(count)
    return Perplexity(value, spread, count * (context - 1), count, context, _protocol(dtype, windows))


def not_finite(measured: Perplexity, windows: TokenWindows) -> SecateurError:
    """The error of a model whose perplexity is no number."""
    return SecateurError(
        f"perplexity on {windows.source} is {'not a number' if math.isnan(measured.value) else 'infinite'}; "
        "the model's weights are damaged, or its dtype overflows: evaluate in float32"
    )


def vocabulary_of(model: nn.Module) -> int:
    """How many token ids the model knows."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.weight.shape[0])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode the model was in comes back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _logits(model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    """Float32 or wider ``(B, T, V)``."""
    try:
        return call_model(model, {"input_ids": ids_BT.to(next(model.parameters()).device)}).logits.float()
    except IndexError as error:
        config: Any = model.config
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        if positions is None or ids_BT.shape[1] <= positions:
            raise
        raise SecateurError(
            f"windows of {ids_BT.shape[1]} tokens are longer than the model's {positions} positions; "
            f"give --window-length {positions} or less"
        ) from error


def _window_losses(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy of each window, float64 ``(B,)``."""
    # The vocabulary has to be the last dimension: over a strided one the softmax adds up in plain order, which in float32
    # moves the loss by 1e-4.
    following_P = ids_BT[:, 1:].flatten().to(logits_BTV.device)
    losses_M = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), following_P, reduction="none")
    return losses_M.double().reshape(len(ids_BT), -1).mean(dim=1)


def _protocol(dtype: torch.dtype, windows: TokenWindows) -> str:
    count, context = windows.ids_NT.shape
    return (
        f"{windows.description}; context {context}, stride {context}, {count * (context - 1):,} tokens predicted, "
        f"each window on its own, {windows.beginning}, {str(dtype).removeprefix('torch.')}"
    )
