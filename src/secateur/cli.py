"""The command line: one command a stage. It parses, calls the API and prints; decisions are made elsewhere."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from secateur.errors import RecipeError, SecateurError, Stopped
from secateur.flags import RemoteOption, with_recipe, with_shared

app = typer.Typer(
    name="secateur",
    help="Prune a large language model by what its gradients, activations and weights say, and get back a checkpoint "
    "that ordinary tools load.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
stdout = Console()

NO_MEMORY = "this machine's memory is used up; give a smaller --micro-batch, --memory or --window-length"

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing result, once the new one is complete.")
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")]
PushOption = Annotated[
    str | None,
    typer.Option(metavar="REPO", help="Upload the finished folder to this hub repository.", show_default=False),
]
ChosenRecipe = Callable[[], Any]
"""Reads the recipe that the flags of ``with_recipe`` make, once logging is set up."""
OutOption = Annotated[
    Path, typer.Option(help="The folder to write; it appears when everything has succeeded.", show_default=False)
]


def _version(wanted: bool) -> None:
    if wanted:
        from secateur import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the program as a whole."""


def _begin(verbose: bool) -> None:
    from secateur import console

    console.setup(verbose)
    if _worker():  # the one that leads speaks for all
        console.stderr.quiet = True


def _worker() -> int:
    """This process's number among those that torchrun has started."""
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return int(rank) if rank.isdigit() and size.isdigit() and int(size) > 1 else 0


def _only_with(flag: str, given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            raise RecipeError(f"{name} belongs to {flag}, which is not given; give both or neither")


def _print_json(record: Any) -> None:
    print(json.dumps(record, indent=1, ensure_ascii=False))


@app.command()
@with_recipe
def prune(
    chosen: ChosenRecipe,
    out: OutOption,
    evaluate_on: Annotated[
        str | None,
        typer.Option(
            "--evaluate",
            metavar="TEXT",
            help="Measure perplexity before and after on this text (`python-docs` or a file) "
            "and put it on the model card.",
            show_default=False,
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    other_workers: Annotated[
        bool,
        typer.Option(
            "--other-workers",
            help="Go on with an interrupted run although it was begun with another number of workers; sums may then differ in "
            "their last bits.",
        ),
    ] = False,
    push_to_hub: PushOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Score, choose, remove, and write a folder that `AutoModelForCausalLM.from_pretrained` loads.

    Example: `secateur prune smollm2 --out smaller --unit channel --ratio 0.25`
    """
    _begin(verbose)
    recipe = chosen()
    from secateur import run
    from secateur.report.tables import run_table

    result = run.prune(recipe, out, overwrite, evaluate_on, push_to_hub, other_workers)
    if result.folder is None:
        return  # another worker leads, and prints
    if as_json:
        _print_json({"out": str(result.folder), "already_complete": result.complete_before, **result.record})
    else:
        stdout.print(run_table(result.record, out))


@app.command()
@with_recipe
def plan(
    chosen: ChosenRecipe,
    out: Annotated[Path, typer.Option(help="Where the plan goes: a .json file, or a folder for plan.json.")] = Path(
        "plan.json"
    ),
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Make the same decision as `prune`, write nothing but the plan, and print sizes before and after."""
    _begin(verbose)
    recipe = chosen()
    from secateur import run
    from secateur.report.tables import plan_table

    _, result = run.make_plan(recipe, out, overwrite)
    if as_json:
        _print_json(result.record)
    else:
        stdout.print(plan_table(result.record))


@app.command()
def apply(
    plan_path: Annotated[
        Path, typer.Argument(metavar="PLAN", help="A plan.json, or a folder that holds one.", show_default=False)
    ],
    out: OutOption,
    model: Annotated[
        str | None, typer.Option(help="Where the plan's model is now, if not where the plan says.", show_default=False)
    ] = None,
    overwrite: OverwriteOption = False,
    push_to_hub: PushOption = None,
    trust_remote_code: RemoteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Carry out a saved plan; the weights are those that `prune` would have written."""
    _begin(verbose)
    from secateur import run
    from secateur.report.tables import run_table

    result = run.apply(plan_path, out, model, overwrite, push_to_hub, trust_remote_code)
    if as_json:
        _print_json({"out": str(result.folder), "already_complete": result.complete_before, **result.record})
    else:
        stdout.print(run_table(result.record, out))


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="A folder with safetensors, a .gguf file, a hub id, or `smollm2`.", show_default=False)
    ],
    prove: Annotated[
        bool,
        typer.Option(
            "--prove",
            help="Also cut every kind of unit out of a small random instance of the config, and compare with the same units "
            "masked out. Exit code 2 if any differs.",
        ),
    ] = False,
    trust_remote_code: RemoteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show the model's blocks, the units found in them, and its parameters by kind."""
    _begin(verbose)
    from secateur.inspection import check_proofs, inspect_model, proof_table, prove_model

    inspection = inspect_model(model, trust_remote_code)
    proofs = prove_model(model, trust_remote_code) if prove else []
    if as_json:
        _print_json(inspection.to_json() | ({"proofs": [vars(proof) for proof in proofs]} if prove else {}))
    else:
        stdout.print(inspection.render())
        if prove:
            stdout.print(proof_table(proofs))
    check_proofs(proofs)


@app.command()
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="One model, or several to compare; the first is the yardstick.", show_default=False
        ),
    ],
    text: Annotated[
        str,
        typer.Option(
            help="`python-docs` (English that Python itself carries), a text, JSONL or Parquet file, "
            "`hub:...`, or .safetensors with input_ids."
        ),
    ] = "python-docs",
    window_length: Annotated[
        int | None, typer.Option(help="Context: tokens in a window. [default: 512]", show_default=False)
    ] = None,
    max_windows: Annotated[int, typer.Option(help="Use at most this many windows, from the beginning.")] = 32,
    alone: Annotated[
        bool, typer.Option("--alone", help="Do not set a pruned model beside the one it came from.")
    ] = False,
    speed: Annotated[
        bool,
        typer.Option(help="Also measure prefill and decode at batch 1 and 8, the models in turn, and KL to the first."),
    ] = True,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="What every model continues, to be read side by side in the report; may be given again. "
            "[default: a sentence about apple trees; '' for none]",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Measure tasks of lm-eval instead, with commas between: boolq,piqa,hellaswag,winogrande,arc_easy,arc_challenge,"
            "openbookqa,lambada, or any other it knows.",
            show_default=False,
        ),
    ] = None,
    tasks_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where the tasks' questions are as JSON Lines (boolq_val.jsonl, piqa_val.jsonl, ...), or task files of lm-eval; "
            "nothing is fetched then.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Ask only the first so many questions of each task.", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Requests at once, of --tasks. [default: 1]", show_default=False)
    ] = None,
    trust_remote_code: RemoteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure perplexity, size and speed, before and after side by side; or tasks, with --tasks."""
    _begin(verbose)
    evaluation: Any
    if tasks is not None:
        from secateur.measuring import evaluate_models_on_tasks

        evaluation = evaluate_models_on_tasks(
            models, tasks, tasks_dir, limit, 1 if batch_size is None else batch_size, alone, trust_remote_code
        )
    else:
        _only_with("--tasks", {"--tasks-dir": tasks_dir, "--limit": limit, "--batch-size": batch_size})
        from secateur.evaluation import PROMPT
        from secateur.measuring import evaluate_models

        beginnings = [PROMPT] if prompt is None else [text for text in prompt if text]
        evaluation = evaluate_models(
            models, text, window_length, max_windows, alone, speed, trust_remote_code, beginnings
        )
    if as_json:
        _print_json(evaluation.to_json())
    else:
        stdout.print(evaluation.table())
        stdout.print(evaluation.protocol, style="dim")


@app.command()
@with_shared
def compare(
    shared: dict[str, Any],
    model: Annotated[str, typer.Argument(help="The model that every recipe prunes.", show_default=False)],
    recipes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RECIPE...",
            help="YAML files, or words in quotes: a criterion, then fields of a recipe. `--recipes wanda 'gblm unit=2:4' mine.yaml`",
            show_default=False,
        ),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE]...", hidden=True)] = None,
    out: Annotated[Path, typer.Option(help="The folder of the comparison.")] = Path("compared"),
    text: Annotated[
        str, typer.Option(help="What it is measured on, as for `evaluate`; not what it is calibrated on.")
    ] = "python-docs",
    max_windows: Annotated[int, typer.Option(help="Use at most this many windows of it, from the beginning.")] = 32,
    context: Annotated[
        int | None, typer.Option(help="Tokens in each of them. [default: 512]", show_default=False)
    ] = None,
    seeds: Annotated[
        int, typer.Option(help="Plan every recipe with this many seeds, and show mean ± standard deviation.")
    ] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over in --out.")] = False,
    trust_remote_code: RemoteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Plan several recipes on the same windows and set what they give side by side: perplexity, KL, size, time, memory.

    Example: `secateur compare smollm2 --recipes wanda "gblm unit=2:4" mine.yaml --out compared`
    """
    _begin(verbose)
    from secateur.comparison import compare as compare_recipes
    from secateur.comparison.comparing import check_all_succeeded
    from secateur.report.comparison import comparison_table

    # Words after the first recipe come as arguments: an option takes one.
    comparison = compare_recipes(
        model, [*(recipes or ()), *(more or ())], out, text=text, max_windows=max_windows, context=context, seeds=seeds,
        overwrite=overwrite, trust_remote_code=trust_remote_code or None, **shared,
    )  # fmt: skip
    if as_json:
        _print_json({"out": str(comparison.folder), **comparison.to_json()})
    else:
        stdout.print(comparison_table(comparison))
    check_all_succeeded(comparison)


@app.command()
def recover(
    model: Annotated[str, typer.Argument(metavar="DIR", help="The pruned folder.", show_default=False)],
    out: OutOption,
    data: Annotated[
        str,
        typer.Option(
            help="`self` (text written by the model this one was pruned from), a file, `hub:...`, `python-docs`, "
            "or .safetensors with input_ids."
        ),
    ] = "self",
    windows: Annotated[
        int | None,
        typer.Option(help="How many windows to train on. [default: 256; all of a token file]", show_default=False),
    ] = None,
    window_length: Annotated[
        int | None, typer.Option(help="Tokens in a window. [default: 256]", show_default=False)
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="How: `lora` (low-rank updates, merged); `full` (all weights of the blocks); `distill` (the dense model as "
            "teacher; `distill:student=full,temperature=2,hidden=1`); `spp` (what stays is scaled); "
            "`lora-prune` (heads and channels leave on the way; `lora-prune:ratio=0.5`). Options ride on the name. "
            "Zeros stay zeros by each."
        ),
    ] = "lora",
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the windows. [default: 2]", show_default=False)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; overrides --epochs.", show_default=False)] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Windows in an optimiser step; smaller where there is little data. [default: 64; spp 128]",
            show_default=False,
        ),
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Windows in memory at once. [default: 4]", show_default=False)
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate. [default: the method's; lora 1e-4, full 2e-5, spp 4e-3]", show_default=False
        ),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="AdamW's, decoupled. [default: 0; spp 0.001]", show_default=False)
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of low-rank factors. [default: lora 8, spp 16]", show_default=False)
    ] = None,
    alpha: Annotated[
        int | None,
        typer.Option(help="They count alpha / rank times. [default: lora 16, spp 32]", show_default=False),
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="Of what they are fed. [default: 0.05]", show_default=False)
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(help="Windows kept out to measure on. [default: a twentieth, at least one]", show_default=False),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many looks (ten a run) at the held-out windows without getting better, and keep the best state. "
            "[default: train to the end, keep the last]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    overwrite: OverwriteOption = False,
    push_to_hub: PushOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Tune a pruned model, fold what was learnt into its weights, and save it the same way; zeros stay zeros.

    A run that dies goes on when the same command is given again.
    """
    _begin(verbose)
    from secateur.recovering import recover_folder
    from secateur.recovery import recovery_settings
    from secateur.report.tables import recovery_table

    settings = recovery_settings(
        method=method, rank=rank, alpha=alpha, dropout=dropout, learning_rate=learning_rate, weight_decay=weight_decay,
        batch_size=batch_size, micro_batch=micro_batch, epochs=epochs, steps=steps, held_out=held_out, patience=patience,
        seed=seed,
    )  # fmt: skip
    result = recover_folder(model, out, data, windows, window_length, settings, overwrite, push_to_hub)
    if result.folder is None:
        return  # another worker leads, and prints
    if as_json:
        _print_json({"out": str(result.folder), "already_complete": result.complete_before, **result.record})
    else:
        stdout.print(recovery_table(result.record, out))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the demo's models go.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Under two minutes: less text, fewer steps.")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Prune SmolLM2-135M, recover it, measure it, and show how to load it."""
    _begin(verbose)
    from secateur.demo import run_demo

    run_demo(out, quick)


def main() -> None:
    """Run the command line: what the user can mend is one sentence on stderr and exit code 2."""

    def stop(signum: int, frame: Any) -> None:
        raise Stopped

    # Not KeyboardInterrupt: Typer turns that into a silent end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        app(standalone_mode=False)
    except SecateurError as error:
        _complain(str(error))
    except Stopped:
        _complain("stopped before it was finished")
    except MemoryError:
        _complain(NO_MEMORY)
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        _complain(NO_MEMORY)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone; there is nobody to tell
        sys.exit(2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror or error}; give another path")
    except Exception as error:
        # Typer's own complaints (an unknown flag, a missing argument) become one sentence too; all else is a defect.
        if not hasattr(error, "format_message"):
            raise
        _complain(error.format_message())


def _complain(sentence: str) -> None:
    name = f"secateur, worker {_worker()}" if _worker() else "secateur"
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"{name}: {sentence}", markup=False, emoji=False)
    sys.exit(2)


if __name__ == "__main__":
    main()
