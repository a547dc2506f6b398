"""Which model and which text a plan is made from."""

from __future__ import annotations

from pathlib import Path

from secateur.calibration import TokenWindows, open_windows
from secateur.checkpoint.reader import Checkpoint
from secateur.console import log
from secateur.errors import RecipeError
from secateur.plans import CalibrationIdentity, ModelIdentity
from secateur.recipe import Recipe


def model_identity(checkpoint: Checkpoint) -> ModelIdentity:
    """What a plan says of its model."""
    return ModelIdentity(
        spec=checkpoint.source.spec,
        hub_id=checkpoint.source.hub_id,
        architecture=type(checkpoint.skeleton.model).__name__,
        parameters=checkpoint.parameters(),
        sha256=checkpoint.content_hash,
    )


def calibration_identity(windows: TokenWindows) -> CalibrationIdentity:
    """What a plan says of the windows it was made on."""
    count, length = windows.ids_NT.shape
    return CalibrationIdentity(
        source=windows.source,
        description=windows.description,
        windows=count,
        window_length=length,
        sha256=windows.sha256,
    )


def calibration_windows(checkpoint: Checkpoint, recipe: Recipe, cache: Path | None) -> TokenWindows:
    """The windows that ``recipe`` asks for.

    Raises:
        RecipeError: they are longer than the model has positions.
    """
    config = checkpoint.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    _check_length(recipe.window_length or 0, positions)
    windows = open_windows(
        recipe.calibration,
        model_folder=checkpoint.folder,
        model_hash=checkpoint.content_hash,
        windows=recipe.windows,
        window_length=recipe.window_length,
        seed=recipe.seed,
        vocabulary=config.vocab_size,
        cache=cache,
        trust_remote_code=recipe.trust_remote_code,
        memory=recipe.memory_bytes,
    )
    count, length = windows.ids_NT.shape
    _check_length(length, positions)
    log.info("Calibrating on %d windows of %d tokens (%s).", count, length, windows.description)
    return windows


def _check_length(length: int, positions: int | None) -> None:
    if positions is not None and length > positions:
        raise RecipeError(
            f"windows of {length} tokens are longer than the model's {positions} positions; give --window-length {positions} or less"
        )
