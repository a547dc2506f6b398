"""The recovery stage: a pruned folder in, a recovered folder of the same shapes out."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import secateur
from secateur.calibration import TokenWindows, fingerprint, open_windows
from secateur.checkpoint.architecture import how_to_load
from secateur.checkpoint.manifest import RECORD, write_manifest
from secateur.checkpoint.placement import placement_for
from secateur.checkpoint.reader import Checkpoint, open_checkpoint
from secateur.checkpoint.verify import compare_logits, fresh_logits
from secateur.checkpoint.writer import ShardWriter, TensorSpec, copy_companions
from secateur.console import log, track
from secateur.errors import PlanError, SecateurError
from secateur.files import cache_folder, require_space
from secateur.identities import calibration_identity, model_identity
from secateur.loading import load
from secateur.origin import counted_before, find_teacher, kept_blocks, pruned_from
from secateur.plans import MASKS_FILE, PLAN_FILE, Plan, load_plan
from secateur.realise import MODELLING_FILE, Realisation, check_inputs
from secateur.recipe import Recipe
from secateur.removal.decision import BlockDecision, Removals
from secateur.report.card import recovered_facts, write_card
from secateur.report.count import count_checkpoint, count_folder
from secateur.resuming import Start, present_settings, source_digest
from secateur.run import Result, already_complete, finished, stage, timed_run
from secateur.runfolder import Work, absolute, check_apart, finished_before
from secateur.structure import Structure, find_all_units
from secateur.workers import join

if TYPE_CHECKING:
    from secateur.recovery import RecoverySettings
    from secateur.recovery.settings import RecoveryLog

TRAINING = "training"
"""The folder of checkpoints in a run's scratch."""
WHOLE = "whole"
"""And that of a tuned model out of which units are still to be cut."""

DEFAULT_TRAINING_WINDOWS = 256

SPARSE_FROM = 0.01
"""A matrix with at least this share of exact zeros is sparse on purpose: its zeros are kept."""


def recover_folder(
    spec: str,
    out: Path,
    data: str = "self",
    windows: int | None = None,
    window_length: int | None = None,
    settings: RecoverySettings | None = None,
    overwrite: bool = False,
    push_to_hub: str | None = None,
) -> Result:
    """Tune ``spec`` by ``settings.method``, merge, write to ``out``, and check it in a fresh process.

    A run that died goes on in ``OUT.partial`` when the same is asked for again. Several processes that ``torchrun`` or ``accelerate
    launch`` has started share the windows of every step, and the weights where FSDP is asked for.

    Raises:
        SecateurError: whatever the user can mend; nothing is left behind, except by too little memory or disk.
    """
    from secateur.recovery import RecoverySettings, Teacher, recover_model
    from secateur.recovery.sharding import hidden_from_accelerate

    workers = join(may_shard=True)
    settings, out = settings or RecoverySettings(), absolute(out)
    method = settings.parsed_method()
    checkpoint = open_checkpoint(spec)
    method.check(checkpoint.skeleton.model)  # refused now, not after the text has been written
    check_apart(out, checkpoint.folder, data)
    dense = find_teacher(checkpoint) if method.needs_teacher else None
    skeleton = checkpoint.skeleton
    structure = find_all_units(skeleton.model, skeleton.blocks_name) if method.needs_units else None

    @hidden_from_accelerate()
    def tuned(ids_NT: torch.Tensor, folder: Path) -> tuple[Any, RecoveryLog, dict[str, torch.Tensor]]:
        masks = sparse_masks(checkpoint)
        if masks:
            log.info("%d matrices are sparse; their zeros are kept through training and merging.", len(masks))
        model = _in_stored_dtypes(load(checkpoint.folder), checkpoint)
        teacher = Teacher(load(dense.folder), kept_blocks(checkpoint, dense)) if dense is not None else None
        with stage("training"):
            training = recover_model(
                model,
                ids_NT,
                settings,
                masks or None,
                folder=folder,
                teacher=teacher,
                structure=structure,
                workers=workers,
            )
        return model, training, masks

    if not workers.leads:
        given = workers.first(None)
        if given is not None:
            tuned(*given)
        return Result(None, complete_before=given is None)
    identity = {
        "command": "recover",
        "version": secateur.__version__,
        "code": source_digest(),
        "model": checkpoint.content_hash,
        "data": [data, fingerprint(data), windows, window_length],
        "settings": settings.model_dump(mode="json"),
        "teacher": dense.content_hash if dense is not None else None,
    }
    placement = placement_for("auto", torch.float32)
    start = Start(identity, present_settings(settings.micro_batch, placement, workers.size, workers.shards), overwrite)
    if finished_before(out, start, overwrite):
        workers.first(None)
        return already_complete(out, push_to_hub)
    with timed_run(out, overwrite, start) as (work, record):
        partial = work.folder
        text = _training_windows(checkpoint, data, windows, window_length, settings.seed)
        workers.first((text.ids_NT, work.scratch / TRAINING))
        model, training, masks = tuned(text.ids_NT, work.scratch / TRAINING)
        if training.removed:
            assert structure is not None
            config = _write_cut(checkpoint, model, work, record, training.removed, structure, text)
        else:
            config = checkpoint.config
            _write_whole(checkpoint, model, partial, record, masks)
        _record(record, checkpoint, partial, text, training.to_json(), config)
        recipe = checkpoint.folder / RECORD / "recipe.yaml"
        given = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
        write_card(partial, recovered_facts(record, method.title, given))
    return finished(out, record, push_to_hub)


def _in_stored_dtypes(model: Any, checkpoint: Checkpoint) -> Any:
    """``model`` with every parameter in its stored dtype, in which recovery hands it back."""
    for name, parameter in model.named_parameters():
        if name in checkpoint.tensors:
            parameter.data = parameter.data.to(checkpoint.tensors[name].dtype)
    return model


def _write_whole(
    checkpoint: Checkpoint, model: Any, partial: Path, record: dict[str, Any], masks: Mapping[str, torch.Tensor]
) -> None:
    """Write ``model`` in the shapes of ``checkpoint`` and check it."""
    with stage("writing"):
        _write(checkpoint, model, partial)
    ids_BT = check_inputs(checkpoint)["input_ids"]
    model.float()  # its weights were rounded as they are stored; the written ones are looked at in float32 too
    with torch.no_grad():
        expected = model(input_ids=ids_BT, use_cache=False).logits
    _check_zeros(partial, masks)
    log.info("Checking the written model in a fresh process ...")
    remote = (partial / MODELLING_FILE).is_file()
    with stage("checking"):
        record["logits_difference"] = compare_logits(expected, fresh_logits(partial, ids_BT, remote))


def _write_cut(
    checkpoint: Checkpoint,
    model: Any,
    work: Work,
    record: dict[str, Any],
    removed: list[tuple[int, str, str, list[int]]],
    structure: Structure,
    text: TokenWindows,
) -> Any:
    """Write ``model``, which still has its old shapes, without the units that left in training; returns the config.

    It goes through a plan like any other cut: proved on a small instance, and checked after writing.
    """
    whole = work.scratch / WHOLE
    shutil.rmtree(whole, ignore_errors=True)
    (whole / RECORD).mkdir(parents=True)
    _write(checkpoint, model, whole)
    tuned = open_checkpoint(str(whole))
    # No recipe led here: the plan carries the default one and is not kept; the record says what left.
    recipe = Recipe(model=str(whole), unit=tuple(sorted({kind for _, kind, _, _ in removed})))
    plan = Plan(model=model_identity(tuned), recipe=recipe, calibration=calibration_identity(text))
    removals: dict[int, Removals] = {}
    for block, kind, module, units in removed:
        group = next(g for g in structure.of_block(block) if (g.kind, g.module) == (kind, module))
        removals.setdefault(block, []).append((group, units))
    for block, leaving in removals.items():
        plan.add(block, BlockDecision(leaving))
    realisation = Realisation(tuned, plan, structure)
    realisation.announce()
    with stage("writing"):
        realisation.write(work.folder)
    with stage("checking"):
        record["logits_difference"] = realisation.verify(work.folder)
    return realisation.output.config


def sparse_masks(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """For every prunable parameter that is sparse, where it is not zero, in its own layout; by full parameter name.

    Sparse is what the folder's plan masked, however little of it, and what holds at least ``SPARSE_FROM`` zeros.
    """
    masks = {}
    planned = _masked_by_plan(checkpoint)
    for index in track(range(len(checkpoint.skeleton.blocks)), "Looking for masks"):
        prefix = checkpoint.skeleton.block_prefix(index)
        matrices = checkpoint.skeleton.prunable(index).values()
        masked = {prefix + matrix.parameter for matrix in matrices if prefix + matrix.name in planned}
        for name, weight in checkpoint.read(dict.fromkeys(prefix + matrix.parameter for matrix in matrices)).items():
            kept = weight != 0
            if name in masked or float(kept.float().mean()) <= 1 - SPARSE_FROM:
                masks[name] = kept
    return masks


def _masked_by_plan(checkpoint: Checkpoint) -> set[str]:
    try:
        plan = load_plan(checkpoint.folder)
    except PlanError:
        return set()
    return {checkpoint.skeleton.block_prefix(entry.block) + name for entry in plan.blocks for name in entry.masks}


def _training_windows(
    checkpoint: Checkpoint, data: str, windows: int | None, length: int | None, seed: int
) -> TokenWindows:
    by_default = windows is None and not data.endswith(".safetensors")
    writer = _writer(checkpoint) if data == "self" else checkpoint
    opened = open_windows(
        data,
        model_folder=writer.folder,
        model_hash=writer.content_hash,
        windows=DEFAULT_TRAINING_WINDOWS if by_default else windows,
        window_length=length,
        seed=seed,
        vocabulary=checkpoint.config.get_text_config().vocab_size,
        cache=cache_folder(),
        at_most=by_default,
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
    record: dict[str, Any],
    checkpoint: Checkpoint,
    partial: Path,
    text: TokenWindows,
    training: dict[str, Any],
    config: Any,
) -> None:
    before, after = count_checkpoint(checkpoint), count_folder(partial)
    dense = counted_before(checkpoint.folder)
    record |= {"dense": dense} if dense else {}
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
        "load": asdict(how_to_load(config)),
    }
