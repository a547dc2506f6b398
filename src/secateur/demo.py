"""The main job on a real model: SmolLM2's MLP channels cut by a quarter, recovered, measured and loaded."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.panel import Panel

from secateur import __version__
from secateur.checkpoint.manifest import RECORD
from secateur.checkpoint.source import resolve_model
from secateur.console import log
from secateur.evaluation import PROMPT, evaluate
from secateur.inspection import inspect_model
from secateur.loading import load
from secateur.measuring import note_everywhere
from secateur.recipe import recipe_from
from secateur.recovering import recover_folder
from secateur.recovery import RecoverySettings
from secateur.report.measured import PERPLEXITY
from secateur.report.page import PAGE
from secateur.resuming import present_settings, read_start, source_digest
from secateur.run import prune
from secateur.runfolder import RUN_FILE, absolute, partial_of


@dataclass(frozen=True)
class DemoSize:
    """How much text the demo uses: calibration windows, training windows, their length, test windows."""

    calibration: int
    training: int
    length: int
    steps: int
    test: int


FULL = DemoSize(calibration=24, training=96, length=128, steps=32, test=12)
QUICK = DemoSize(calibration=8, training=8, length=96, steps=4, test=3)


def run_demo(out: Path, quick: bool = False) -> None:
    """Prune, recover, evaluate and show. Nothing is fetched; what has been finished before is not done again."""
    started = time.monotonic()
    console = Console()
    size = QUICK if quick else FULL
    out = out / "quick" if quick else out
    log.info("[1/5] Discovering SmolLM2-135M's structure by tracing it without weights.")
    console.print(inspect_model("smollm2").render())
    log.info("[2/5] Pruning a quarter of SmolLM2-135M's MLP channels by first-order Taylor on text it writes itself.")
    recipe = recipe_from(
        model="smollm2",
        criterion="taylor",
        unit="channel",
        ratio=0.25,
        calibration="self",
        windows=size.calibration,
        window_length=size.length,
    )
    pruned = prune(recipe, out / "pruned", overwrite=_stale(out / "pruned"))
    log.info("[3/5] Recovering: LoRA for %d short steps, merged afterwards.", size.steps)
    settings = RecoverySettings(steps=size.steps, batch_size=8, micro_batch=8, learning_rate=1e-3, held_out=4)
    recovered = recover_folder(
        str(out / "pruned"), out / "recovered", "self", size.training, size.length, settings, _stale(out / "recovered")
    )
    assert pruned.folder is not None
    assert recovered.folder is not None
    folders = {
        "dense": resolve_model("smollm2").folder,
        "pruned": pruned.folder,
        "recovered": recovered.folder,
    }
    log.info("[4/5] Measuring all three on text that none of them wrote: the documentation inside Python itself.")
    evaluation = evaluate(
        folders,
        text="python-docs",
        window_length=512,
        max_windows=size.test,
        load=load,
        speed_batches=(1,),
        prompts=(PROMPT,),
    )
    log.info("[5/5] Putting what was measured into the reports.")
    note_everywhere(folders, PERPLEXITY, evaluation.to_json())
    console.print()
    console.print(evaluation.table())
    console.print(evaluation.protocol, style="dim")
    console.print()
    for name, text in evaluation.continuations[PROMPT].items():
        console.print(Panel(f"[dim]{PROMPT}[/dim]{text}", title=name, title_align="left"))
    console.print(
        f"Done in {time.monotonic() - started:.0f} s. The smaller model is in [bold]{out / 'recovered'}[/bold]; load it with:\n"
    )
    console.print(_three_lines(out / "recovered"), highlight=False, soft_wrap=True)
    console.print(f"All of it to look at, in a browser: [bold]{out / 'recovered' / PAGE}[/bold]")


def _stale(folder: Path) -> bool:
    """Whether ``folder`` is a result of another version, or unfinished work of other code, which the demo may replace."""
    left = read_start(partial_of(absolute(folder)))
    if left is not None and left.goes_on:
        here = left.settings.bound() == present_settings(left.settings.micro_batch).bound()
        if not here or left.identity.get("code") != source_digest():
            return True
    try:
        record = json.loads((folder / RECORD / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(record["identity"]["version"] != __version__)


def _three_lines(folder: Path) -> str:
    return (
        "    from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'    model = AutoModelForCausalLM.from_pretrained("{folder}")\n'
        f'    tokenizer = AutoTokenizer.from_pretrained("{folder}")\n'
    )
