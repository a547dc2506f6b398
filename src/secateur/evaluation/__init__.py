"""Evaluation: how well models predict text, how large they are and how fast they run, side by side."""

from secateur.evaluation.compare import PROMPT, Evaluation, ModelFigures, evaluate
from secateur.evaluation.continuation import continuations
from secateur.evaluation.efficiency import Size, Speed, macs_per_token, measure_speed, size_of
from secateur.evaluation.perplexity import Perplexity, perplexity

__all__ = [
    "PROMPT",
    "Evaluation",
    "ModelFigures",
    "Perplexity",
    "Size",
    "Speed",
    "continuations",
    "evaluate",
    "macs_per_token",
    "measure_speed",
    "perplexity",
    "size_of",
]
