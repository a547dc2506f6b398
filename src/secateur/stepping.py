"""Planning in one round or in several, each on a model from which the rounds before have taken their part."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from secateur.allocation.pools import Key
from secateur.checkpoint.manifest import FILES, RECORD
from secateur.checkpoint.reader import Checkpoint, open_checkpoint
from secateur.console import log
from secateur.errors import ModelError, PlanError
from secateur.gathering import Workplace
from secateur.identities import model_identity
from secateur.planning import Planner, removes_nothing
from secateur.plans import PLAN_FILE, Plan, load_plan
from secateur.preflight import refuse_what_cannot_fit
from secateur.realise import Realisation
from secateur.recipe import Recipe
from secateur.removal.composition import compose
from secateur.removal.decision import BlockDecision, Removals, model_cut
from secateur.resuming import DECISION, ROUND
from secateur.runlog import say
from secateur.statistics import InputSecondMoment
from secateur.structure import Structure
from secateur.workers import Workers


def make_decision(
    checkpoint: Checkpoint,
    recipe: Recipe,
    workplace: Workplace,
    out: Path | None = None,
    fix: Callable[[int], None] = lambda micro_batch: None,
) -> tuple[Plan, Structure]:
    """Plan what leaves ``checkpoint``; return also its units, which carrying out needs again.

    Args:
        out: where the pruned model will be written; None: it will not be.
        fix: told the micro-batch, should it have to be another than was asked for.

    Raises:
        RecipeError: the recipe asks for what the model does not have, or would remove nothing.
        ResourceError: the machine has too little memory or disk for it.
    """
    planner, workers = Planner(checkpoint, recipe, workplace), workplace.workers
    file = workplace.scratch / DECISION / PLAN_FILE
    plan = kept_plan(file, recipe) if workers.leads else None
    if workers.first(plan is not None):
        log.info("What leaves was decided before the run was interrupted.")
    else:
        prepare(planner, out, fix)
        plan = planner.plan() if recipe.steps == 1 else _plan_in_steps(planner)
        if workers.leads:
            plan.save(file)
        workers.wait()
    if not workers.leads:
        plan = load_plan(file)
    assert plan is not None
    return plan, planner.structure


def prepare(planner: Planner, out: Path | None, fix: Callable[[int], None]) -> None:
    """Say what the work will take, refuse what cannot be done, and give the planner the memory and micro-batch there are.

    Raises:
        ResourceError: the machine has too little memory or disk for it.
    """
    place, workers = planner.workplace, planner.workplace.workers
    estimate = planner.estimate(out)
    if workers.leads:
        _warn_of_little_text(planner)
    say(f"This will take {estimate.in_words()}.", "preflight", **estimate.to_json())
    refuse_what_cannot_fit(estimate, planner.recipe, place.scratch, place.cache or place.scratch, out)
    micro_batch = min(workers.all(estimate.micro_batch))
    if micro_batch != (place.micro_batch or planner.recipe.micro_batch) and workers.leads:
        fix(micro_batch)
    planner.workplace = replace(place, memory=estimate.spare, micro_batch=micro_batch)


def _warn_of_little_text(planner: Planner) -> None:
    """Say loudly where fewer tokens are measured than a matrix has inputs: their second moments then have no full rank.

    Dampening makes them invertible all the same, so nothing fails, but weights are fitted to the few directions that the text
    has.
    """
    recipe, skeleton = planner.recipe, planner.checkpoint.skeleton
    if InputSecondMoment not in recipe.needs():
        return
    tokens = planner.windows.ids_NT.numel()
    shapes = [
        matrix.shape(skeleton.block_shapes(index))
        for index in planner.blocks
        for matrix in skeleton.prunable(index).values()
    ]
    widest = max((inputs for _, inputs in shapes), default=0)
    if tokens < widest:
        log.warning(
            "TOO LITTLE TEXT: %s has %d calibration tokens for matrices of up to %d inputs, so weights that are "
            "fitted to it may well be worse than unfitted ones; give at least %d tokens with --windows or --window-length, or a longer --calibration text.",
            planner.removal.name if planner.removal.updates else planner.criterion.name,
            tokens,
            widest,
            widest,
        )


def kept_plan(file: Path, recipe: Recipe) -> Plan | None:
    """The plan that an interrupted attempt at this very run left; None where there is none or it is damaged."""
    try:
        plan = load_plan(file)
    except PlanError:
        return None
    plan.recipe = recipe  # which may allow another amount of memory now
    return plan


def _plan_in_steps(dense: Planner) -> Plan:
    """Reach the recipe's goal in rounds; the plan is their composition in the dense model's numbers."""
    checkpoint, recipe, structure = dense.checkpoint, dense.recipe, dense.structure
    workers = dense.workplace.workers
    goal, steps = dense.chooser.goal(), recipe.steps
    count = len(checkpoint.skeleton.blocks)
    allowed = recipe.middle(count) if recipe.allocation == "two-tier" else dense.blocks
    needs = bool(dense.criterion.needs())
    chosen, plan = dict[int, Removals](), None
    cut = checkpoint
    for step in range(1, steps + 1):
        blocks = model_cut(chosen, count).kept()
        part = goal.part(step, steps, blocks, _by_pool(chosen))
        if goal.leaving and not any(part.leaving.values()):
            continue
        scratch = dense.workplace.scratch / f"{ROUND}{step}"
        kept = workers.first(kept_plan(scratch / PLAN_FILE, recipe) if workers.leads else None)
        if kept is not None:
            log.info("Round %d of %d was finished before.", step, steps)
            plan = kept
        else:
            log.info("Round %d of %d.", step, steps)
            if plan is not None:
                cut = _realised(Realisation(checkpoint, plan, structure), scratch / "model", workers)
            planner = Planner(
                cut,
                _recipe_of_round(recipe, [new for new, old in enumerate(blocks) if old in allowed], step == steps),
                replace(dense.workplace, scratch=scratch),
                part,
                dense.windows if needs else None,
            )
            found = planner.plan()
            plan = _plan_of(
                checkpoint, recipe, compose(structure, chosen, found.everywhere(planner.structure, len(blocks))), found
            )
            if workers.leads:
                plan.save(scratch / PLAN_FILE)
            workers.wait()
        chosen = _chosen_of(plan, structure, count)
    if plan is None or not plan.removes_anything():
        raise removes_nothing(recipe)
    plan.notes = dense.chooser.notes | plan.notes
    return plan


def _by_pool(chosen: dict[int, Removals]) -> dict[Key, list[int]]:
    """The units that are gone; hidden channels once, from outside the blocks."""
    return {(group.kind, block, group.module): units for block, removals in chosen.items() for group, units in removals}


def _recipe_of_round(recipe: Recipe, allowed: list[int], last: bool) -> Recipe:
    """What one round has to know: how much leaves is given to it, and the ends of two tiers are left out."""
    blocks = None if recipe.names_no_blocks else f"{allowed[0]}:{allowed[-1] + 1}"
    changes = {
        "steps": 1,
        "allocation": "global" if recipe.allocation == "global" else "uniform",
        "blocks": None if "hidden" in recipe.cut_kinds else blocks,
        "protect": None,
        "round_to": recipe.round_to if last else 1,
    }
    return recipe.model_copy(update=changes)


def _plan_of(checkpoint: Checkpoint, recipe: Recipe, chosen: dict[int, Removals], found: Plan) -> Plan:
    plan = Plan(model=model_identity(checkpoint), recipe=recipe, calibration=found.calibration, notes=found.notes)
    for block, removals in chosen.items():
        plan.add(block, BlockDecision(removals))
    return plan


def _chosen_of(plan: Plan, structure: Structure, blocks: int) -> dict[int, Removals]:
    everywhere = plan.everywhere(structure, blocks)
    return {entry.block: everywhere[entry.block] for entry in plan.blocks}


def _realised(realisation: Realisation, folder: Path, workers: Workers) -> Checkpoint:
    """The model as the rounds so far leave it; one that an interrupted attempt has written whole is used again."""
    remote = realisation.plan.recipe.trust_remote_code
    if workers.leads and not _opens(folder, remote):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        realisation.write(folder)
    workers.wait()
    return open_checkpoint(str(folder), remote)


def _opens(folder: Path, remote: bool) -> bool:
    """Whether a whole model is there; its list of files is written last."""
    if not (folder / RECORD / FILES).is_file():
        return False
    try:
        open_checkpoint(str(folder), remote)
    except ModelError:
        return False
    return True
