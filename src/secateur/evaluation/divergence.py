"""How far a model's predictions are from the dense model's, token by token.

Shape legend: ``B`` windows at once, ``T`` tokens, ``V`` vocabulary, ``M`` predicted tokens of a window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

PIECE_NUMBERS = 1 << 24
"""Log-probabilities that are looked at together: with a large vocabulary those of a whole window are gigabytes."""


def log_probabilities(logits_BTV: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of every next token but the one after the window, ``(B, T - 1, V)`` float32.

    ``logits_BTV`` are the caller's to lose: their memory is used again.
    """
    # The vocabulary has to lie together: over a strided dimension sums are formed in plain order, which costs digits.
    logits_BMV = logits_BTV[:, :-1].float().contiguous()
    for logits_V in _pieces(logits_BMV):
        logits_V.sub_(logits_V.logsumexp(dim=-1, keepdim=True))
    return logits_BMV


@dataclass(frozen=True)
class Divergence:
    """How far one model's predictions are from the dense model's, over the predicted tokens of the same windows.

    Attributes:
        value: KL(dense || model), nats a token.
        standard_error: of ``value``, from the spread between windows; None for a single window.
        agreement: share of tokens for which both models hold the same one likeliest.
    """

    value: float
    standard_error: float | None
    agreement: float


@dataclass
class Tally:
    """Adds up what one model predicts, a mean for each window, float64 ``(B,)`` each.

    Attributes:
        losses: cross-entropy with the tokens that follow.
        divergences: Kullback-Leibler divergence of the dense model's distribution from this model's, nats a token.
        agreements: share of tokens for which both models hold the same one likeliest.
    """

    losses: list[torch.Tensor] = field(default_factory=list)
    divergences: list[torch.Tensor] = field(default_factory=list)
    agreements: list[torch.Tensor] = field(default_factory=list)

    def add(self, ids_BT: torch.Tensor, log_p_BMV: torch.Tensor, log_q_BMV: torch.Tensor) -> None:
        """One micro-batch: the dense model's log-probabilities, and this model's."""
        self.add_loss(ids_BT, log_q_BMV)
        divergences, same = [], []
        for log_p_V, log_q_V in zip(_pieces(log_p_BMV), _pieces(log_q_BMV), strict=True):
            divergences.append((log_p_V.exp() * (log_p_V - log_q_V)).sum(dim=-1, dtype=torch.float64))
            same.append(log_p_V.argmax(dim=-1) == log_q_V.argmax(dim=-1))
        self.divergences.append(_means(divergences, len(ids_BT)))
        self.agreements.append(_means(same, len(ids_BT)))

    def add_loss(self, ids_BT: torch.Tensor, log_q_BMV: torch.Tensor) -> None:
        """One micro-batch of a model that is set beside no other."""
        following_BM1 = ids_BT[:, 1:, None].to(log_q_BMV.device)
        losses_BM = -log_q_BMV.gather(-1, following_BM1).squeeze(-1).double()
        self.losses.append(losses_BM.mean(dim=1).cpu())

    def divergence(self) -> Divergence:
        """What the windows so far come to."""
        value, error = mean_and_error(self.divergences)
        return Divergence(value, error, mean_and_error(self.agreements)[0])


def mean_and_error(values: list[torch.Tensor]) -> tuple[float, float | None]:
    """The mean over windows and its standard error; None for a single window."""
    values_N = torch.cat(values)
    error = values_N.std().item() / math.sqrt(len(values_N)) if len(values_N) > 1 else None
    return values_N.mean().item(), error


def _pieces(numbers_BMV: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Some tokens of all windows after each other, ``(..., V)``: views, which may be written to."""
    vocabulary = numbers_BMV.shape[-1]
    return numbers_BMV.view(-1, vocabulary).split(max(1, PIECE_NUMBERS // vocabulary))


def _means(pieces: list[torch.Tensor], windows: int) -> torch.Tensor:
    return torch.cat(pieces).double().reshape(windows, -1).mean(dim=1).cpu()
