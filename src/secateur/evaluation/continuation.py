"""What models write after a prompt: nothing measured, but the first thing a person looks at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.evaluation.perplexity import evaluating


def continuations(
    models: Mapping[str, nn.Module], tokenizer: Any, prompt: str, max_new_tokens: int = 40
) -> dict[str, str]:
    """What each model writes after ``prompt``: always the likeliest token, so the same every time; the prompt left out.

    Raises:
        SecateurError: the prompt is empty.
    """
    encoded = tokenizer(prompt, return_tensors="pt")
    ids_1T = encoded["input_ids"].long()
    if not ids_1T.numel():
        raise SecateurError("the prompt is empty; give the models a few words to go on from")
    return {name: _continue(model, tokenizer, ids_1T, max_new_tokens) for name, model in models.items()}


def _continue(model: Any, tokenizer: Any, ids_1T: torch.Tensor, max_new_tokens: int) -> str:
    from transformers import GenerationConfig

    own = model.generation_config
    ids_1T = ids_1T.to(model.device)
    # The model's own settings may sample or penalise; only its end token is kept.
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id or 0,
    )
    try:
        with evaluating(model):
            written_1T = model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T))
    finally:
        model.generation_config = own
    return tokenizer.decode(written_1T[0, ids_1T.shape[1] :], skip_special_tokens=True)
