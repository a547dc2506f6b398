"""The recovery stage: a pruned folder in, a recovered folder of the same shapes out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import secateur
from secateur.calibration import TokenWindows, fingerprint, open_windows
from secateur.checkpoint.architecture import how_to_load
from secateur.checkpoint.manifest import RECORD, write_manifest
from secateur.checkpoint.reader import Checkpoint, open_checkpoint
from secateur.checkpoint.verify import compare_logits, fresh_logits
from secateur.checkpoint.writer import ShardWriter, TensorSpec, copy_companions
from secateur.console import log, track
from secateur.errors import PlanError, SecateurError
from secateur.files import cache_folder, require_space
from secateur.loading import load
from secateur.plans import MASKS_FILE, PLAN_FILE, load_plan
from secateur.realise import MODELLING_FILE, check_inputs
from secateur.report.card import recovered_facts, write_card
from secateur.report.count import count_checkpoint, count_folder
from secateur.resuming import Start, present_settings
from secateur.run import Result, already_complete, finished, timed_run
from secateur.runfolder import absolute, check_apart, finished_before

if TYPE_CHECKING:
    from secateur.recovery import LoraSettings

DEFAULT_TRAINING_WINDOWS = 256

SPARSE_FROM = 0.01
"""A matrix with at least this share of exact zeros is sparse on purpose: its zeros are kept."""


def recover_folder(
    spec: str,
    out: Path,
    data: str = "self",
    windows: int | None = None,
    window_length: int | None = None,
    settings: LoraSettings | None = None,
    overwrite: bool = False,
    push_to_hub: str | None = None,
) -> Result:
    """Train LoRA on ``spec``, merge, write to ``out``, and check it in a fresh process.

    Raises:
        SecateurError: whatever the user can mend; nothing is left behind.
    """
    from secateur.recovery import LoraSettings, block_linears, recover_model

    settings, out = settings or LoraSettings(), absolute(out)
    checkpoint = open_checkpoint(spec)
    block_linears(checkpoint.skeleton.model)  # refused now, not after the text has been written
    check_apart(out, checkpoint.folder, data)
    identity = {
        "command": "recover",
        "version": secateur.__version__,
        "model": checkpoint.content_hash,
        "data": [data, fingerprint(data), windows, window_length],
        "settings": settings.model_dump(mode="json"),
    }
    # Training is not resumed: what an interrupted attempt left is of no use.
    start = Start(identity, present_settings(settings.micro_batch), overwrite, goes_on=False)
    if finished_before(out, start, overwrite):
        return already_complete(out, push_to_hub)
    with timed_run(out, overwrite, start) as (work, record):
        partial = work.folder
        text = _training_windows(checkpoint, data, windows, window_length, settings.seed)
        masks = sparse_masks(checkpoint)
        if masks:
            log.info("%d matrices are sparse; their zeros are kept through training and merging.", len(masks))
        model = load(checkpoint.folder)
        training = recover_model(model, text.ids_NT, settings, masks or None)
        _write(checkpoint, model, partial)
        ids_BT = check_inputs(checkpoint)["input_ids"]
        with torch.no_grad():
            expected = model(input_ids=ids_BT, use_cache=False).logits.float()
        _check_zeros(partial, masks)
        _record(record, checkpoint, partial, text, training.to_json())
        log.info("Checking the written model in a fresh process ...")
        # In 16 bits the written weights are rounded, and so are those of the model in memory after merging.
        remote = (partial / MODELLING_FILE).is_file()
        record["logits_difference"] = compare_logits(expected, fresh_logits(partial, ids_BT, remote))
        recipe = checkpoint.folder / RECORD / "recipe.yaml"
        write_card(partial, recovered_facts(record, recipe.read_text(encoding="utf-8") if recipe.is_file() else None))
    return finished(out, record, push_to_hub)


def sparse_masks(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """For every prunable matrix that is sparse, where it is not zero; by full parameter name.

    Sparse is what the folder's plan masked, however little of it, and what holds at least ``SPARSE_FROM`` zeros.
    """
    masks = {}
    planned = _masked_by_plan(checkpoint)
    for index in track(range(len(checkpoint.skeleton.blocks)), "Looking for masks"):
        prefix = checkpoint.skeleton.block_prefix(index)
        matrices = checkpoint.skeleton.prunable(index).values()
        # Training changes no others: packed experts and transposed matrices keep their zeros by themselves.
        trained = [prefix + m.parameter for m in matrices if m.expert is None and not m.transposed]
        for name, weight_OI in checkpoint.read(trained).items():
            kept_OI = weight_OI != 0
            if name in planned or float(kept_OI.float().mean()) <= 1 - SPARSE_FROM:
                masks[name] = kept_OI
    return masks


def _masked_by_plan(checkpoint: Checkpoint) -> set[str]:
    try:
        plan = load_plan(checkpoint.folder)
    except PlanError:
        return set()
    return {checkpoint.skeleton.block_prefix(entry.block) + name for entry in plan.blocks for name in entry.masks}


def pruned_from(folder: Path) -> str | None:
    """The model that a pruned (or recovered) folder was made from, if its record says."""
    try:
        record = json.loads((folder / RECORD / "run.json").read_text(encoding="utf-8"))
        return str(record["model"]["spec"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _training_windows(
    checkpoint: Checkpoint, data: str, windows: int | None, length: int | None, seed: int
) -> TokenWindows:
    if windows is None and not data.endswith(".safetensors"):
        windows = DEFAULT_TRAINING_WINDOWS
    writer = _writer(checkpoint) if data == "self" else checkpoint
    opened = open_windows(
        data,
        model_folder=writer.folder,
        model_hash=writer.content_hash,
        windows=windows,
        window_length=length,
        seed=seed,
        vocabulary=checkpoint.config.get_text_config().vocab_size,
        cache=cache_folder(),
    )
    log.info("Training on %d windows of %d tokens (%s).", *opened.ids_NT.shape, opened.description)
    return opened


def _writer(checkpoint: Checkpoint) -> Checkpoint:
    """Who writes ``self`` text: the dense model, which knows better what the pruned one has to learn again."""
    original = pruned_from(checkpoint.folder)
    if original is None:
        return checkpoint
    try:
        return open_checkpoint(original)
    except SecateurError:
        log.warning("The model it was pruned from (%s) is not here; the pruned model writes its own text.", original)
        return checkpoint


def _write(checkpoint: Checkpoint, model: Any, folder: Path) -> None:
    """Write ``model``'s weights in the dtypes and with the companions of ``checkpoint``."""
    state = model.state_dict()
    order = [name for name in state if name in checkpoint.tensors]
    specs = [TensorSpec(n, tuple(state[n].shape), checkpoint.tensors[n].dtype) for n in order]
    require_space(folder, sum(spec.bytes for spec in specs), "the recovered model")
    writer = ShardWriter(folder, specs)
    try:
        for spec in track(specs, "Writing"):
            writer.write({spec.name: state[spec.name].detach().to(spec.dtype)})
        files = writer.close()
    finally:
        writer.abandon()
    for name in ("config.json", MODELLING_FILE):
        source = checkpoint.folder / name
        if source.is_file():
            (folder / name).write_bytes(source.read_bytes())
    copy_companions(checkpoint.folder, folder)
    for record in (PLAN_FILE, MASKS_FILE, "recipe.yaml"):
        source = checkpoint.folder / RECORD / record
        if source.is_file():
            (folder / RECORD / record).write_bytes(source.read_bytes())
    write_manifest(folder, files)


def _check_zeros(folder: Path, masks: Mapping[str, torch.Tensor]) -> None:
    """Read the written files: where a sparse matrix was zero it has to be zero still."""
    written = open_checkpoint(str(folder))
    for name, kept_OI in masks.items():
        if written.read([name])[name][~kept_OI].any():
            raise SecateurError(f"recovery lost zeros of '{name}'; nothing was kept (please report this)")


def _record(
    record: dict[str, Any], checkpoint: Checkpoint, partial: Path, text: TokenWindows, training: dict[str, Any]
) -> None:
    before, after = count_checkpoint(checkpoint), count_folder(partial)
    count, length = text.ids_NT.shape
    record |= {
        "model": {
            "spec": pruned_from(checkpoint.folder) or checkpoint.source.spec,
            "hub_id": checkpoint.source.hub_id,
            "card": checkpoint.source.card,
            "recovered_from": checkpoint.source.spec,
        },
        "data": {
            "source": text.source,
            "description": text.description,
            "windows": count,
            "window_length": length,
            "sha256": text.sha256,
        },
        "before": before.to_json(),
        "after": after.to_json(),
        "training": training,
        "uneven": (partial / MODELLING_FILE).is_file(),
        "load": asdict(how_to_load(checkpoint.config)),
    }
