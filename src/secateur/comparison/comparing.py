"""Several recipes on one model: the same windows, one table.

Each recipe is planned in a process of its own; what they can share (calibration windows, dense scores, gradients) is made
once and found in the cache by the others. Then all pruned models are measured together, in one walk over the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

import secateur
from secateur.biases import with_biases
from secateur.calibration import TokenWindows, fingerprint
from secateur.calibration.stored import KEY
from secateur.checkpoint.placement import placement_for
from secateur.checkpoint.reader import Checkpoint, open_checkpoint
from secateur.comparison.child import PlanningFailedError, plan_in_child
from secateur.comparison.entries import Entry, read_entries
from secateur.comparison.folder import (
    CALIBRATION,
    CHILD_LOG,
    COMPARISON,
    DENSE,
    PAGE,
    RECIPE,
    RECIPES,
    SCRATCH,
    TABLES,
    RunFolder,
    check_folder,
    comparison_folder,
    read_json,
)
from secateur.comparison.heldout import check_overlap, held_out_windows
from secateur.comparison.result import FIGURES, Comparison, Row, row_of
from secateur.console import log
from secateur.errors import PlanError, RecipeError
from secateur.evaluation.variants import Measured, measure_variants
from secateur.files import atomic_file, cache_folder, write_json
from secateur.identities import calibration_windows
from secateur.memory import memory_now
from secateur.plans import load_plan
from secateur.preflight import limit_of
from secateur.realise import Realisation
from secateur.recipe import Recipe
from secateur.runfolder import absolute, check_apart
from secateur.structure import Structure, find_all_units
from secateur.sweep import SweepSettings
from secateur.sweep.sweep import require_causal
from secateur.workers import alone

NOT_FINITE = "its figures are not finite on the held-out windows: what is left of the weights overflows"


@dataclass(frozen=True)
class _Run:
    """One recipe with one seed."""

    entry: Entry
    recipe: Recipe
    folder: RunFolder

    @property
    def key(self) -> str:
        return f"{self.entry.name}, seed {self.recipe.seed}"


def compare(
    model: str,
    recipes: Sequence[str | Path],
    out: Path,
    *,
    text: str = "python-docs",
    max_windows: int | None = 32,
    context: int | None = None,
    seeds: int = 1,
    overwrite: bool = False,
    **given: Any,
) -> Comparison:
    """Plan every recipe on the same calibration windows and measure what each would give on the same held-out ones.

    A comparison that was interrupted goes on; recipes that were finished in ``out`` are not run again. A recipe that fails
    leaves the others alone.

    Args:
        model: as for ``prune``.
        recipes: YAML files, or words such as ``wanda`` or ``"gblm unit=2:4"``.
        out: the folder of the comparison.
        text: the held-out text, as for ``evaluate``.
        max_windows: use at most so many of its windows.
        context: tokens in each; by default 512, or what the file or the model's positions say.
        seeds: plan every recipe with so many seeds, from the recipes' own seed on.
        overwrite: start over in ``out``.
        given: fields of a recipe that hold for all: ``calibration``, ``windows``, ``seed``, ``device``, ``memory``, ...

    Raises:
        SecateurError: what was asked for cannot be compared; one sentence.
    """
    alone("compare")
    if seeds < 1:
        raise RecipeError(f"--seeds is how many seeds each recipe is planned with, at least 1, not {seeds}")
    model = str(Path(model).expanduser().resolve()) if Path(model).expanduser().exists() else model
    entries = read_entries(model, recipes, given)
    shared = entries[0].recipe
    out = absolute(out)
    checkpoint = open_checkpoint(model, shared.trust_remote_code)
    require_causal(checkpoint)
    check_apart(out, checkpoint.folder, text, shared.calibration, *_files(recipes))
    identity = {"version": secateur.__version__, "model": checkpoint.content_hash}
    check_folder(out, identity, overwrite)  # before the minutes that windows may take
    held_out = held_out_windows(checkpoint, text, context, max_windows, shared.trust_remote_code)
    drawn = not shared.calibration.partition(":")[0].endswith(".safetensors")
    calibration = _calibration(checkpoint, entries, range(shared.seed, shared.seed + seeds), drawn)
    notes = check_overlap(held_out, calibration.values())
    if seeds > 1 and not drawn:
        notes.append("The calibration windows are fixed, so seeds change only what is random in a recipe itself.")
    with comparison_folder(out, identity, overwrite) as folder:
        runs = _runs(folder, entries, checkpoint, calibration, seeds, drawn)
        for run in runs:
            run.folder.open()
            _check_plan(run)
        for run in sorted(runs, key=lambda run: run.entry.measures(len(checkpoint.skeleton.blocks))):
            _plan(folder, run, calibration)
        _measure(folder, checkpoint, runs, held_out)
        comparison = _gathered(folder, checkpoint, entries, runs, held_out, calibration, notes)
        _write(comparison)
    log.info("The comparison is in %s; to look at: %s.", out, out / PAGE)
    return comparison


def check_all_succeeded(comparison: Comparison) -> None:
    """Refuse to pass over recipes that failed.

    Raises:
        RecipeError: some did; the sentence names them.
    """
    failed = comparison.failed
    if failed:
        raise RecipeError(
            f"{len(failed)} of {len(comparison.rows) - 1} recipes failed ({', '.join(failed)}); the table says why, and the same "
            "command tries them again"
        )


def _files(recipes: Sequence[str | Path]) -> list[str]:
    """The recipes that are files: what the comparison replaces must not hold them."""
    return [str(recipe) for recipe in recipes if Path(recipe).is_file()]


def _calibration(
    checkpoint: Checkpoint, entries: Sequence[Entry], seeds: Sequence[int], drawn: bool
) -> dict[int, TokenWindows]:
    """The calibration windows of each seed, cut once for all recipes; none where no recipe needs any."""
    recipe = next((entry.recipe for entry in entries if entry.recipe.reads_text), None)
    if recipe is None:
        return {}
    fingerprint(recipe.calibration)  # a text that is not there is refused before the model is read
    opened: dict[int, TokenWindows] = {}
    for seed in seeds:
        if drawn or not opened:
            one = recipe.model_copy(update={"seed": seed})
            opened[seed] = calibration_windows(checkpoint, one, cache_folder())
        else:
            opened[seed] = opened[seeds[0]]
    return opened


def _runs(
    folder: Path,
    entries: Sequence[Entry],
    checkpoint: Checkpoint,
    calibration: Mapping[int, TokenWindows],
    seeds: int,
    drawn: bool,
) -> list[_Run]:
    runs = []
    for entry in entries:
        first = entry.recipe.seed
        for seed in range(first, first + (seeds if entry.depends_on_seed(drawn) else 1)):
            recipe = entry.recipe.model_copy(update={"seed": seed})
            place = folder / RECIPES / entry.folder_name
            windows = calibration[seed].sha256 if recipe.reads_text else None
            identity = {
                "version": secateur.__version__,
                "model": checkpoint.content_hash,
                "recipe": _chosen(recipe),
                "calibration": windows,
            }
            runs.append(
                _Run(entry, recipe, RunFolder(place if seed == first else place / f"seed-{seed}", entry.name, identity))
            )
    return runs


def _chosen(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe shapes its plan; the windows are known by their content."""
    apart = {"model", "memory", "device", "calibration", "windows", "window_length"}
    return recipe.model_dump(mode="json", exclude=apart)


# -- planning


def _check_plan(run: _Run) -> None:
    """A plan that was finished before has to be whole still.

    Raises:
        PlanError: it is damaged.
    """
    if "planning" not in run.folder.record:
        return
    try:
        load_plan(run.folder.plan_file)
    except PlanError as error:
        raise _unusable(run, error) from error


def _unusable(run: _Run, error: PlanError) -> PlanError:
    return PlanError(
        f"the plan kept for the recipe '{run.entry.name}' cannot be used ({error}); remove {run.folder.folder}, or give "
        "--overwrite to start over"
    )


def _plan(folder: Path, run: _Run, calibration: Mapping[int, TokenWindows]) -> None:
    """Plan one recipe in a process of its own, unless that was finished before."""
    kept = run.folder
    if "planning" in kept.record:
        log.info("%s was planned before.", run.key)
        return
    kept.forget("failed", "measured")
    # A failed attempt starts afresh; one that left neither plan nor reason was interrupted.
    interrupted = kept.record.get("attempts", 0) if kept.record.get("begun") else 0
    kept.note(seed=run.recipe.seed, name=run.entry.name, attempts=interrupted + 1, begun=True)
    recipe = run.recipe
    if recipe.reads_text:
        file = _windows_file(folder, recipe.seed, calibration[recipe.seed])
        recipe = recipe.model_copy(update={"calibration": str(file), "windows": None, "window_length": None})
    kept.folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(kept.folder / RECIPE) as temporary:
        temporary.write_text(recipe.to_yaml(), encoding="utf-8")
    log.info("Planning %s.", run.key)
    try:
        planning = plan_in_child(kept.folder / RECIPE, kept.plan_file, kept.folder / CHILD_LOG)
    except PlanningFailedError as error:
        log.warning("%s failed: %s.", run.key, error)
        kept.note(failed=str(error), begun=False)
        return
    kept.note(planning=planning.to_json(), begun=False)


def _windows_file(folder: Path, seed: int, windows: TokenWindows) -> Path:
    """Where the windows of one seed lie for the children."""
    file = folder / CALIBRATION / f"seed-{seed}.safetensors"
    with atomic_file(file) as temporary:
        save_file({KEY: windows.ids_NT.contiguous()}, temporary)
    return file


# -- measuring


def _measure(folder: Path, checkpoint: Checkpoint, runs: Sequence[_Run], windows: TokenWindows) -> None:
    """Measure what has not been measured on these windows, all in one walk; figures are kept beside each plan."""
    planned = [run for run in runs if "planning" in run.folder.record]
    placement = placement_for(runs[0].recipe.device, checkpoint.dtype)
    on = {"windows": windows.sha256, "placement": placement.describe()}
    missing = [run for run in planned if run.folder.record.get("on") != on or "measured" not in run.folder.record]
    if not missing and read_json(folder / DENSE).get("on") == on:
        return
    for run in missing:  # all run in one model, which has what any of them writes to
        checkpoint = with_biases(checkpoint, run.recipe)
    structure = _structure(checkpoint, missing)
    variants = {run.key: _realised(checkpoint, run, structure) for run in missing}
    memory = _spare(checkpoint, runs[0].recipe, windows)
    settings = SweepSettings(runs[0].recipe.micro_batch, memory, folder / SCRATCH, placement)
    measured = measure_variants(checkpoint, variants, windows, settings)
    _keep(folder, measured, missing, on)


def _realised(checkpoint: Checkpoint, run: _Run, structure: Structure | None) -> Realisation:
    """The plan of ``run``, its new weights looked through before anything is measured.

    Raises:
        PlanError: they are missing or damaged.
    """
    try:
        realisation = Realisation(checkpoint, load_plan(run.folder.plan_file), structure)
        realisation.check_numbers()
    except PlanError as error:
        raise _unusable(run, error) from error
    return realisation


def _keep(folder: Path, measured: Measured, runs: Sequence[_Run], on: dict[str, str]) -> None:
    for run in runs:
        figures = measured.variants[run.key]
        if figures.is_finite:
            run.folder.forget("failed")
            run.folder.note(measured=asdict(figures), on=on)
        else:
            run.folder.forget("measured")
            run.folder.note(failed=NOT_FINITE)
    dense = {"on": on, "perplexity": asdict(measured.dense), "nonzero_parameters": measured.dense_nonzero_parameters}
    write_json(folder / DENSE, dense, durable=True)


def _structure(checkpoint: Checkpoint, runs: Sequence[_Run]) -> Structure | None:
    """The model's units, traced once for all plans that cut any."""
    skeleton = checkpoint.skeleton
    cuts = any(run.recipe.cut_kinds for run in runs)
    return find_all_units(skeleton.model, skeleton.blocks_name) if cuts else None


def _spare(checkpoint: Checkpoint, recipe: Recipe, windows: TokenWindows) -> int:
    """Bytes for what crosses between blocks: beside it stand a few copies of a block, and logits of two models."""
    skeleton, text = checkpoint.skeleton, checkpoint.config.get_text_config()
    block = max(
        sum(shape.numel() for name, shape in skeleton.shapes().items() if name.startswith(skeleton.block_prefix(index)))
        for index in range(len(skeleton.blocks))
    )
    logits = recipe.micro_batch * windows.ids_NT.shape[1] * text.vocab_size
    return max(0, limit_of(recipe) - memory_now() - 4 * (4 * block + 4 * logits))


# -- gathering


def _gathered(
    folder: Path,
    checkpoint: Checkpoint,
    entries: Sequence[Entry],
    runs: Sequence[_Run],
    windows: TokenWindows,
    calibration: Mapping[int, TokenWindows],
    notes: Sequence[str],
) -> Comparison:
    dense = read_json(folder / DENSE)
    rows = [_dense_row(checkpoint, dense)]
    rows += [row_of(entry.name, [run.folder.record for run in runs if run.entry is entry]) for entry in entries]
    results = {entry.name: [run.folder.record for run in runs if run.entry is entry] for entry in entries}
    record = {
        "model": checkpoint.source.spec,
        "model_sha256": checkpoint.content_hash,
        "version": secateur.__version__,
        "text": windows.source,
        "windows_sha256": windows.sha256,
        "protocol": dense["perplexity"]["protocol"],
        "calibration": {
            str(seed): {"description": one.description, "windows": list(one.ids_NT.shape), "sha256": one.sha256}
            for seed, one in calibration.items()
        },
        "notes": list(notes),
        "rows": [row.flat() for row in rows],
        "dense": dense,
        "recipes": results,
    }
    return Comparison(folder, rows, record)


def _dense_row(checkpoint: Checkpoint, dense: Mapping[str, Any]) -> Row:
    values: dict[str, list[float]] = {figure: [] for figure in FIGURES}
    values |= {
        "perplexity": [dense["perplexity"]["value"]],
        "parameters": [checkpoint.parameters()],
        "nonzero_parameters": [dense["nonzero_parameters"]],
        "bytes": [sum(tensor.bytes for tensor in checkpoint.tensors.values())],
    }
    return Row("dense", [], values, [])


def _write(comparison: Comparison) -> None:
    from secateur.report.comparison import comparison_markdown
    from secateur.report.page import write_comparison_pages

    write_json(comparison.folder / COMPARISON, comparison.record)
    write_comparison_pages(comparison)
    for name, text in zip(TABLES, (comparison.to_csv(), comparison_markdown(comparison)), strict=True):
        with atomic_file(comparison.folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
