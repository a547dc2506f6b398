"""The stages in order: plan, carry out, check, count, describe. What the command line and ``import secateur`` call."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import secateur
from secateur.biases import with_biases
from secateur.calibration import fingerprint, text_windows
from secateur.checkpoint.architecture import how_to_load
from secateur.checkpoint.manifest import RECORD
from secateur.checkpoint.placement import Placement, placement_for
from secateur.checkpoint.reader import Checkpoint, open_checkpoint
from secateur.console import event, log
from secateur.errors import OutputError, PlanError, SecateurError
from secateur.files import cache_folder, full_disk_is_an_error, remove_temporaries, sync_tree, write_json
from secateur.gathering import Workplace
from secateur.hub import push_folder
from secateur.memory import memory_peak, require_memory
from secateur.plans import PLAN_FILE, Plan, load_plan, masks_beside, numbers_beside, plan_summary
from secateur.realise import Realisation, describe_sizes
from secateur.recipe import Recipe
from secateur.report.card import pruned_facts, write_card
from secateur.report.count import count_checkpoint, count_folder
from secateur.report.page import PAGE, write_run_page
from secateur.report.words import asked, notes_in_words, reached
from secateur.resuming import Start, applied, present_settings, read_start, source_digest
from secateur.runfolder import (
    RUN_FILE,
    Work,
    absolute,
    cached_work,
    check_apart,
    check_free,
    finished_before,
    run_folder,
    trim_unfinished,
    unfinished_place,
)
from secateur.runlog import EVENT_LOG, attempts, read_events, stage_seconds
from secateur.stepping import make_decision
from secateur.structure import Structure
from secateur.workers import ALONE, Workers, alone, join

WRITING = "writing"
"""The folder of what has been written, a line a block."""


@dataclass(frozen=True)
class Result:
    """What a stage gives back.

    Attributes:
        folder: where the result lies (None for a plan that was not saved).
        record: everything that was counted and decided, JSON-able; the content of ``secateur/run.json``.
        complete_before: the same run had been finished already and nothing was done.
    """

    folder: Path | None
    record: dict[str, Any] = field(default_factory=dict)
    complete_before: bool = False


def make_plan(recipe: Recipe, out: Path | None = None, overwrite: bool = False) -> tuple[Plan, Result]:
    """Decide what would leave, and write nothing but the plan.

    Args:
        out: a ``.json`` file, or a folder that will hold ``plan.json``; None saves nothing.
    """
    began = time.monotonic()
    alone("plan")
    checkpoint = with_biases(open_checkpoint(recipe.model, recipe.trust_remote_code), recipe)
    placement = placement_for(recipe.device, checkpoint.dtype)
    settings = present_settings(recipe.micro_batch, placement)
    start = Start(_identity("plan", recipe, checkpoint, out=str(out)), settings)
    place = unfinished_place(cache_folder(), start)
    made = _same_plan(out, recipe, checkpoint.content_hash) if out is not None and not overwrite else None
    if made is not None:
        trim_unfinished(place.parent, place)  # where it was killed after its last file
        log.info("%s holds this very plan already.", out)
        return made, Result(
            out, _plan_record(made, Realisation(checkpoint, made)) | {"plan": str(out)}, complete_before=True
        )
    file = _plan_file(out, overwrite, goes_on=read_start(place) is not None)
    with cached_work(place, start) as work:
        plan, structure = decide(checkpoint, recipe, work, placement)
        realisation = Realisation(checkpoint, plan, structure)
        realisation.announce()
        before, after = realisation.sizes()
        record = _plan_record(plan, realisation)
        record |= {"seconds": round(time.monotonic() - began, 2), "peak_memory": memory_peak()}
        log.info("Would go from %s.", describe_sizes(before, after))
        if file is not None:
            with full_disk_is_an_error(file.parent):
                plan.save(file)
            record["plan"] = str(file)
            log.info("The plan is in %s; carry it out with: secateur apply %s --out DIR", file, file)
        plan = plan.outlasting(file)
    return plan, Result(file, record)


def _identity(command: str, recipe: Recipe, checkpoint: Checkpoint, **more: Any) -> dict[str, Any]:
    """What the result depends on. ``memory`` decides what goes to disk and changes no bit; the device is a setting."""
    text = fingerprint(recipe.calibration) if recipe.reads_text else None  # refused before weights are read
    return {
        "command": command,
        "version": secateur.__version__,
        "code": source_digest(),
        "recipe": recipe.model_dump(mode="json", exclude={"memory", "device"}),
        "model": checkpoint.content_hash,
        "calibration": text,
        **more,
    }


def prune(
    recipe: Recipe,
    out: Path,
    overwrite: bool = False,
    evaluate_on: str | None = None,
    push_to_hub: str | None = None,
    other_workers: bool = False,
) -> Result:
    """Plan, carry out, check in a fresh process, count what was written, and describe it.

    A run that died goes on in ``OUT.partial`` when the same is asked for again.

    Args:
        other_workers: go on although the run was begun with another number of workers.
    """
    workers = join()
    checkpoint = with_biases(open_checkpoint(recipe.model, recipe.trust_remote_code), recipe)
    placement = placement_for(recipe.device, checkpoint.dtype)
    if not workers.leads:
        checkpoint.take_hash(workers.first(None))
        return _follow(checkpoint, recipe, placement, workers)
    out = absolute(out)
    check_apart(out, checkpoint.folder, recipe.calibration, evaluate_on)
    if evaluate_on is not None:
        text_windows(evaluate_on, checkpoint.folder, max_windows=1)  # refused now, not after all the work
        need = "to measure perplexity the model has to be in memory as a whole, in float32, which"
        require_memory(4 * checkpoint.parameters(), need, "leave --evaluate out", recipe.memory_bytes)
    evaluated = [evaluate_on, fingerprint(evaluate_on)] if evaluate_on else None
    identity = _identity("prune", recipe, checkpoint, evaluate_on=evaluated)
    workers.first(checkpoint.content_hash)
    settings = present_settings(recipe.micro_batch, placement, workers.size)
    start = Start(identity, settings, overwrite, other_workers=other_workers)
    if finished_before(out, start, overwrite):
        workers.first(None)
        return already_complete(out, push_to_hub)
    with timed_run(out, overwrite, start) as (work, record):
        workers.first(work)
        with stage("choosing"):
            plan, structure = decide(checkpoint, recipe, work, placement, workers, work.folder)
        _carry_out(Realisation(checkpoint, plan, structure), work, record, evaluate_on, workers)
    return finished(out, record, push_to_hub)


def _follow(checkpoint: Checkpoint, recipe: Recipe, placement: Placement, workers: Workers) -> Result:
    """What every worker does but the one that leads: measure on its windows, choose in its matrices, write its blocks."""
    work: Work | None = workers.first(None)
    if work is None:
        return Result(None, complete_before=True)
    with applied(work.settings):
        plan, structure = decide(checkpoint, recipe, work, placement, workers, work.folder)
        realisation = Realisation(checkpoint, plan, structure)
        realisation.write_share(work.folder, work.scratch / WRITING, (workers.rank, workers.size))
        workers.wait()
    return Result(None)


def decide(
    checkpoint: Checkpoint,
    recipe: Recipe,
    work: Work,
    placement: Placement,
    workers: Workers = ALONE,
    out: Path | None = None,
) -> tuple[Plan, Structure]:
    """What leaves, decided in ``work`` with the settings that were fixed there; ``out`` is where it will be carried out."""
    place = Workplace(work.scratch, cache_folder(), placement, workers, micro_batch=work.settings.micro_batch)
    return make_decision(checkpoint, recipe, place, out, work.fix_micro_batch)


def apply(
    plan_path: Path,
    out: Path,
    model: str | None = None,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    trust_remote_code: bool = False,
) -> Result:
    """Carry out a saved plan: the same weights that ``prune`` writes.

    Args:
        model: where the plan's model is now, if not where the plan says.
    """
    alone("apply")
    plan = load_plan(plan_path)
    out = absolute(out)
    if plan.recipe.trust_remote_code and not trust_remote_code:
        raise PlanError(
            f"the plan at {plan_path} asks to run code that comes with the model; allow it with --trust-remote-code"
        )
    checkpoint = with_biases(open_checkpoint(model or plan.model.spec, trust_remote_code), plan.recipe)
    check_apart(out, checkpoint.folder, str(plan_path))
    if not plan.removes_anything():
        raise PlanError(f"the plan at {plan_path} removes nothing; make another")
    try:
        notes_in_words(plan.notes)  # told when all is written: what cannot be is refused now
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PlanError(f"the notes of the plan at {plan_path} are not what a plan notes; make it again") from error
    try:
        realisation = Realisation(checkpoint, plan)
        realisation.check_numbers()
    except PlanError as error:
        raise PlanError(f"the plan at {plan_path} cannot be carried out: {error}") from error
    content = json.dumps(plan.model_dump(mode="json"), sort_keys=True)
    identity = {
        "command": "apply",
        "version": secateur.__version__,
        "code": source_digest(),
        "plan": hashlib.sha256(content.encode()).hexdigest(),
        "model": checkpoint.content_hash,
    }
    start = Start(identity, present_settings(plan.recipe.micro_batch), overwrite)
    if finished_before(out, start, overwrite):
        return already_complete(out, push_to_hub)
    with timed_run(out, overwrite, start) as (work, record):
        _carry_out(realisation, work, record, None)
    return finished(out, record, push_to_hub)


@contextmanager
def timed_run(out: Path, overwrite: bool, start: Start) -> Iterator[tuple[Work, dict[str, Any]]]:
    """A run folder whose record is written last, just before it becomes ``out``.

    Of what a run writes only the record's ``seconds``, ``stages`` and ``attempts``, and the logs, tell one that was
    interrupted from one that was not.
    """
    with run_folder(out, start, overwrite) as work:
        record: dict[str, Any] = {"identity": start.identity}
        yield work, record
        events = read_events(work.record / EVENT_LOG)
        record["settings"] = asdict(
            (read_start(work.folder) or start).settings
        )  # the micro-batch may have been settled
        record["attempts"] = attempts(events)
        record["seconds"] = round(sum(attempt["seconds"] for attempt in record["attempts"]), 2)
        record["stages"] = stage_seconds(events)
        write_run_page(work.folder, record)
        # Whole on the disk before the record says so; with the record there, only the renaming is left.
        sync_tree(work.folder)
        write_json(work.record / RUN_FILE, record, durable=True)
        shutil.rmtree(work.scratch, ignore_errors=True)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Note in the run's log when a stage began and ended."""
    event("stage started", stage=name)
    yield
    event("stage finished", stage=name)


def _carry_out(
    realisation: Realisation,
    work: Work,
    record: dict[str, Any],
    evaluate_on: str | None,
    workers: Workers = ALONE,
) -> None:
    plan, recipe, partial = realisation.plan, realisation.plan.recipe, work.folder
    realisation.announce()
    with stage("writing"):
        realisation.write_share(partial, work.scratch / WRITING, (workers.rank, workers.size))
        workers.wait()
        realisation.finish(partial, work.scratch / WRITING)
    plan.save(partial / RECORD / PLAN_FILE, with_numbers=False)
    (partial / RECORD / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    record |= _plan_record(plan, realisation)
    with stage("checking"):
        record["logits_difference"] = realisation.verify(partial)
    groups = realisation.structure.units or None
    blocks = recipe.block_range(len(realisation.cut.blocks))
    pattern = None if recipe.parsed_policy() else recipe.n_of_m  # with a policy each block has its own
    after = count_folder(partial, groups, pattern, blocks, recipe.trust_remote_code, realisation.cut.kept())
    before = count_checkpoint(realisation.checkpoint, groups)
    if after.valid_n_of_m is False:
        raise OutputError(
            f"{recipe.n_of_m} does not hold in every group of what was written; nothing was kept (please report this)"
        )
    record |= {"before": before.to_json(), "after": after.to_json(), "reached": reached(plan, before, after)}
    if evaluate_on is not None:
        from secateur.evaluation import evaluate
        from secateur.loading import load

        evaluation = evaluate(
            {"dense": realisation.checkpoint.folder, "pruned": partial}, text=evaluate_on, load=load, speed=False
        )
        record["evaluation"] = evaluation.to_json()
        for figures in record["evaluation"]["models"].values():
            del figures["folder"]  # the folder it was measured in is about to be renamed
    write_card(partial, pruned_facts(plan, realisation.checkpoint.source.card, record))
    log.info("Asked for %s.", asked(plan))
    log.info("Reached: %s.", record["reached"])
    for line in notes_in_words(plan.notes):
        log.info("%s.", line[0].upper() + line[1:])
    difference = record["logits_difference"]
    agrees = f"agrees to {difference:.0e}" if difference else "gives the same logits"
    log.info("%s; the fresh process %s.", describe_sizes(*realisation.sizes()), agrees)


def _plan_record(plan: Plan, realisation: Realisation) -> dict[str, Any]:
    before, after = realisation.sizes()
    return {
        "model": plan.model.model_dump(),
        "asked": asked(plan),
        "chosen": plan_summary(plan),
        "notes": plan.notes,
        "calibration": plan.calibration.model_dump() if plan.calibration else None,
        "architecture": realisation.output.architecture,
        "uneven": realisation.output.uneven,
        "load": asdict(how_to_load(realisation.output.config)),
        "sizes": {"before": before.to_json(), "after": after.to_json()},
    }


def _same_plan(out: Path, recipe: Recipe, model_hash: str) -> Plan | None:
    """The plan at ``out``, where it is the one that would be made: same recipe, same model, same version."""
    try:
        plan = load_plan(out)
    except SecateurError:
        return None
    same = (plan.recipe, plan.model.sha256, plan.secateur) == (recipe, model_hash, secateur.__version__)
    text_is_fixed = plan.calibration is None or recipe.calibration == "self"
    return plan if same and text_is_fixed else None


def _plan_file(out: Path | None, overwrite: bool, goes_on: bool) -> Path | None:
    """The file to write.

    Raises:
        OutputError: it is there already. Where the work ``goes_on`` its masks may be: a plan is saved after its masks.
    """
    if out is None:
        return None
    file = out if out.suffix == ".json" else out / PLAN_FILE
    present = next(place for place in absolute(file).parents if place.exists())
    if not os.access(present, os.W_OK):
        raise OutputError(f"{file} cannot be written: {present} does not allow it; give another --out")
    if goes_on:
        for written in (file, masks_beside(file)):
            remove_temporaries(file.parent, written.name)
        overwrite = overwrite or not file.exists()
    if file != out:
        check_free(out, overwrite)
        return file
    for written in (file, masks_beside(file), numbers_beside(file)):
        if written.exists() and not overwrite:
            raise OutputError(f"{written} is there already; give another --out, or --overwrite")
    return file


def already_complete(out: Path, push: str | None) -> Result:
    log.info("%s is already complete: it is the result of this very run.", out)
    record = json.loads((out / RECORD / RUN_FILE).read_text(encoding="utf-8"))
    if push:
        push_folder(out, push)
    return Result(out, record, complete_before=True)


def finished(out: Path, record: dict[str, Any], push: str | None) -> Result:
    log.info("The result is in %s (%.0f s); what was done to it, to look at: %s.", out, record["seconds"], out / PAGE)
    if push:
        push_folder(out, push)
    return Result(out, record)
