"""The command line: one command a stage. It parses, calls the API and prints; decisions are made elsewhere."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from secateur.errors import SecateurError, Stopped

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

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        help="A folder with safetensors, a .gguf file, a hub id such as org/name, or `smollm2`.", show_default=False
    ),
]
CriterionOption = Annotated[
    str | None,
    typer.Option(
        help="What a weight is worth: random, magnitude, wanda, gblm, taylor. Options ride on the name: "
        "`gblm:norm=l2,alpha=100`, `taylor:order=mixed`. [default: taylor]",
        show_default=False,
    ),
]
UnitOption = Annotated[
    str | None,
    typer.Option(
        help="What leaves together: `weight`; N:M such as `2:4` (keep 2 of every 4 inputs); `head` (with grouped queries a "
        "whole KV group); `query` (one query head from every group); `channel` (MLP). Several: `head,channel`. [default: channel]",
        show_default=False,
    ),
]
RatioOption = Annotated[
    float | None,
    typer.Option(
        help="Share of units of each kind in each block that leaves, in [0, 1), rounded down. "
        "[default: 0.2 for what is cut, 0.5 for weights]",
        show_default=False,
    ),
]
WithinOption = Annotated[
    str | None,
    typer.Option(
        help="Where single weights compete: row, layer (one matrix) or global. [default: row]", show_default=False
    ),
]
AllocationOption = Annotated[
    str | None,
    typer.Option(
        help="uniform: the same share from every block. global: one ranking over the model, scores per parameter; "
        "blocks then differ in size. [default: uniform]",
        show_default=False,
    ),
]
ReduceOption = Annotated[
    str | None,
    typer.Option(
        help="How a unit's matrices count together: sum, mean, max, prod, first or last. [default: sum]",
        show_default=False,
    ),
]
PropagateOption = Annotated[
    str | None,
    typer.Option(
        help="What the blocks see: dense (scores are kept, another ratio costs seconds) or pruned inputs. "
        "[default: as published; pruned for wanda and gblm]",
        show_default=False,
    ),
]
BlocksOption = Annotated[
    str | None,
    typer.Option(
        help="FIRST:LAST, the blocks that may be pruned, LAST excluded; `4:30` protects the ends.", show_default=False
    ),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        help="`self` (text the model writes itself), a .txt, .jsonl or .parquet file, "
        "`hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]`, `python-docs`, or .safetensors with input_ids (N, T). [default: self]",
        show_default=False,
    ),
]
WindowsOption = Annotated[
    int | None, typer.Option(help="How many calibration windows. [default: 32]", show_default=False)
]
LengthOption = Annotated[int | None, typer.Option(help="Tokens in a window. [default: 256]", show_default=False)]
SeedOption = Annotated[int | None, typer.Option(help="Seed of everything random. [default: 0]", show_default=False)]
MicroBatchOption = Annotated[
    int | None, typer.Option(help="Windows that run through a block at once. [default: 1]", show_default=False)
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        help="What block inputs and kept activations may take; the rest goes to disk or is computed again. [default: 2GiB]",
        show_default=False,
    ),
]
RecipeOption = Annotated[
    Path | None, typer.Option(help="YAML with the same fields as these flags; flags win.", show_default=False)
]
RemoteOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing result, once the new one is complete.")
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")]
PushOption = Annotated[
    str | None,
    typer.Option(metavar="REPO", help="Upload the finished folder to this hub repository.", show_default=False),
]
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


def _recipe(file: Path | None, trust_remote_code: bool, **given: Any) -> Any:
    from secateur.recipe import recipe_from

    return recipe_from(file, trust_remote_code=trust_remote_code or None, **given)


def _begin(verbose: bool) -> None:
    from secateur import console

    console.setup(verbose)


def _print_json(record: Any) -> None:
    print(json.dumps(record, indent=1, ensure_ascii=False))


@app.command()
def prune(
    out: OutOption,
    model: ModelArgument = None,
    criterion: CriterionOption = None,
    unit: UnitOption = None,
    ratio: RatioOption = None,
    within: WithinOption = None,
    allocation: AllocationOption = None,
    reduce: ReduceOption = None,
    propagate: PropagateOption = None,
    blocks: BlocksOption = None,
    calibration: CalibrationOption = None,
    windows: WindowsOption = None,
    window_length: LengthOption = None,
    seed: SeedOption = None,
    micro_batch: MicroBatchOption = None,
    memory: MemoryOption = None,
    recipe: RecipeOption = None,
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
    push_to_hub: PushOption = None,
    trust_remote_code: RemoteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Score, choose, remove, and write a folder that `AutoModelForCausalLM.from_pretrained` loads.

    Example: `secateur prune smollm2 --out smaller --unit channel --ratio 0.25`
    """
    _begin(verbose)
    chosen = _recipe(
        recipe, trust_remote_code, model=model, criterion=criterion, unit=unit, ratio=ratio, within=within,
        allocation=allocation, reduce=reduce, propagate=propagate, blocks=blocks, calibration=calibration,
        windows=windows, window_length=window_length, seed=seed, micro_batch=micro_batch, memory=memory,
    )  # fmt: skip
    from secateur import run
    from secateur.report.tables import run_table

    result = run.prune(chosen, out, overwrite, evaluate_on, push_to_hub)
    if as_json:
        _print_json({"out": str(result.folder), "already_complete": result.complete_before, **result.record})
    else:
        stdout.print(run_table(result.record, out))


@app.command()
def plan(
    model: ModelArgument = None,
    out: Annotated[Path, typer.Option(help="Where the plan goes: a .json file, or a folder for plan.json.")] = Path(
        "plan.json"
    ),
    criterion: CriterionOption = None,
    unit: UnitOption = None,
    ratio: RatioOption = None,
    within: WithinOption = None,
    allocation: AllocationOption = None,
    reduce: ReduceOption = None,
    propagate: PropagateOption = None,
    blocks: BlocksOption = None,
    calibration: CalibrationOption = None,
    windows: WindowsOption = None,
    window_length: LengthOption = None,
    seed: SeedOption = None,
    micro_batch: MicroBatchOption = None,
    memory: MemoryOption = None,
    recipe: RecipeOption = None,
    overwrite: OverwriteOption = False,
    trust_remote_code: RemoteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Make the same decision as `prune`, write nothing but the plan, and print sizes before and after."""
    _begin(verbose)
    chosen = _recipe(
        recipe, trust_remote_code, model=model, criterion=criterion, unit=unit, ratio=ratio, within=within,
        allocation=allocation, reduce=reduce, propagate=propagate, blocks=blocks, calibration=calibration,
        windows=windows, window_length=window_length, seed=seed, micro_batch=micro_batch, memory=memory,
    )  # fmt: skip
    from secateur import run
    from secateur.report.tables import plan_table

    _, result = run.make_plan(chosen, out, overwrite)
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
    trust_remote_code: RemoteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show the model's blocks, the units found in them, and its parameters by kind."""
    _begin(verbose)
    from secateur.inspection import inspect_model

    inspection = inspect_model(model, trust_remote_code)
    if as_json:
        _print_json(inspection.to_json())
    else:
        stdout.print(inspection.render())


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
    speed: Annotated[bool, typer.Option(help="Also measure latency and tokens a second, the models in turn.")] = True,
    trust_remote_code: RemoteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure perplexity, size and speed, before and after side by side."""
    _begin(verbose)
    from secateur.measuring import evaluate_models

    evaluation = evaluate_models(models, text, window_length, max_windows, alone, speed, trust_remote_code)
    if as_json:
        _print_json(evaluation.to_json())
    else:
        stdout.print(evaluation.table())
        stdout.print(evaluation.protocol, style="dim")


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
    epochs: Annotated[float, typer.Option(help="Passes over the windows.")] = 2.0,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; overrides --epochs.", show_default=False)] = None,
    batch_size: Annotated[
        int, typer.Option(help="Windows in an optimiser step; smaller where there is little data.")
    ] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-4,
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 8,
    alpha: Annotated[int, typer.Option(help="LoRA alpha.")] = 16,
    dropout: Annotated[float, typer.Option(help="LoRA dropout.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    overwrite: OverwriteOption = False,
    push_to_hub: PushOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train LoRA adapters on a pruned model, merge them, and save it the same way; zeros stay zeros."""
    _begin(verbose)
    from secateur.recovering import recover_folder
    from secateur.recovery import lora_settings
    from secateur.report.tables import recovery_table

    settings = lora_settings(
        rank=rank, alpha=alpha, dropout=dropout, learning_rate=learning_rate, batch_size=batch_size,
        epochs=epochs, steps=steps, seed=seed,
    )  # fmt: skip
    result = recover_folder(model, out, data, windows, window_length, settings, overwrite, push_to_hub)
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
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"secateur: {sentence}", markup=False, emoji=False)
    sys.exit(2)


if __name__ == "__main__":
    main()
