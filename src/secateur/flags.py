"""The flags that make a recipe, shared by the commands that choose: each is a field of the recipe of the same name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

FLAGS: dict[str, Any] = {
    "model": Annotated[
        str | None,
        typer.Argument(
            help="A folder with safetensors, a .gguf file, a hub id such as org/name, or `smollm2`.", show_default=False
        ),
    ],
    "preset": Annotated[
        str | None,
        typer.Option(
            help="fast (one look at activations), balanced (what stays is updated), best (each block its own share, updated, then "
            "fitted to the dense model; several times the cost of balanced): the fields below that you do not give.",
            show_default=False,
        ),
    ],
    "criterion": Annotated[
        str | None,
        typer.Option(
            help="What a weight is worth: random, magnitude, wanda, gblm, taylor, fms, sparsegpt, ria, wanda++, flap; or what a whole block is "
            "(--unit block): influence, angular. Options ride on the name: "
            "`gblm:norm=l2,alpha=100`, `taylor:order=mixed`. [default: taylor]",
            show_default=False,
        ),
    ],
    "unit": Annotated[
        list[str] | None,
        typer.Option(
            help="What leaves together: `weight`; N:M such as `2:4` (keep 2 of every 4 inputs); `head` (with grouped queries a "
            "whole KV group); `query` (one query head from every group); `channel` (MLP); `expert`; `hidden` (the residual "
            "stream); `block`. Several: `head,channel`. [default: channel]",
            show_default=False,
        ),
    ],
    "ratio": Annotated[
        float | None,
        typer.Option(
            help="Share of units of each kind in each block (hidden, block and two-tier: in the model) that leaves, in [0, 1), "
            "rounded down. [default: 0.2 for what is cut, 0.5 for weights]",
            show_default=False,
        ),
    ],
    "target": Annotated[
        list[str] | None,
        typer.Option(
            help="Instead of --ratio, what remains of the whole model: `params=110M`, `bytes=200MiB`, or how it changes: "
            "`params=-20%`, `macs=-20%` (multiply-accumulates a token). The smallest ratio that reaches it is found.",
            show_default=False,
        ),
    ],
    "round_to": Annotated[
        int | None,
        typer.Option(
            help="Keep a multiple of this many channels and hidden channels, as hardware likes: 8, 64 or 128. Rounded up; what "
            "that cost is said. [default: 1]",
            show_default=False,
        ),
    ],
    "within": Annotated[
        str | None,
        typer.Option(
            help="Where single weights compete: row, share (a matrix, every row up to the same share of its scores), block (128 inputs of "
            "all rows), layer (one matrix) or global. "
            "[default: as published; row, block for sparsegpt]",
            show_default=False,
        ),
    ],
    "removal": Annotated[
        str | None,
        typer.Option(
            help="How what was chosen leaves: mask (zeroed); sparsegpt (what stays is updated; `sparsegpt:bits=4` rounds it too); "
            "alps (mask and update by ADMM); bias (its expected output goes into biases); dsnot (the mask is refined by swaps; `dsnot-published` with the published command line's defaults). Units that are cut can be made good as well: "
            "bias, sparsegpt, alps. [default: as published; mask, sparsegpt for sparsegpt, bias for units by flap]",
            show_default=False,
        ),
    ],
    "reconstruct": Annotated[
        str | None,
        typer.Option(
            help="`block`: what stays of each block is fitted to what the dense model gives there, by gradients, one block in memory; "
            "options ride on the name: `block:epochs=5,rate=0.005`. [default: none]",
            show_default=False,
        ),
    ],
    "allocation": Annotated[
        str | None,
        typer.Option(
            help="uniform: the same share from every block. two-tier: the ends are kept whole (--protect), the same share from "
            "every block between. global: one ranking over the model (--normalise). alpha (AlphaPruning), owl, "
            "sensitivity (measured): each block its own share, of weights too; options ride on the name: "
            "`alpha:metric=mid,spread=0.2`. But for uniform, units cut leave blocks of different sizes. [default: as published; uniform, global for units by flap]",
            show_default=False,
        ),
    ],
    "protect": Annotated[
        str | None,
        typer.Option(
            help="FIRST:LAST, how many blocks two-tier keeps whole at each end. [default: 4:2 of 32, scaled]",
            show_default=False,
        ),
    ],
    "rank": Annotated[
        str | None,
        typer.Option(
            help="global: rank all kinds of units together, or each kind apart, which then gives its own ratio. "
            "[default: together]",
            show_default=False,
        ),
    ],
    "normalise": Annotated[
        str | None,
        typer.Option(
            help="global: what makes scores comparable: parameter (a unit's score is divided by how many it holds) or zscore "
            "(standardised within each kind of each block). [default: as published; parameter, zscore for flap]",
            show_default=False,
        ),
    ],
    "steps": Annotated[
        int | None,
        typer.Option(
            help="Reach the ratio in this many rounds, with fresh scores in each. [default: 1]", show_default=False
        ),
    ],
    "reduce": Annotated[
        str | None,
        typer.Option(
            help="How a unit's matrices count together: sum, mean, max, prod, first or last. [default: sum]",
            show_default=False,
        ),
    ],
    "propagate": Annotated[
        str | None,
        typer.Option(
            help="What the blocks see: dense (scores are kept, another ratio costs seconds) or pruned inputs. "
            "[default: as published; pruned for wanda and gblm]",
            show_default=False,
        ),
    ],
    "gradient": Annotated[
        str | None,
        typer.Option(
            help="Where gradients come from: exact (backpropagation of the loss), block (of each block's own output; no backward "
            "walk) or forward (runs along random directions alone). [default: as published; exact, forward for fms]",
            show_default=False,
        ),
    ],
    "queries": Annotated[
        int | None,
        typer.Option(
            help="--gradient forward: along how many directions, two runs of the model each. [default: 16]",
            show_default=False,
        ),
    ],
    "perturbation": Annotated[
        float | None,
        typer.Option(
            help="--gradient forward: how far along them every weight moves, times a normal number. [default: 0.001]",
            show_default=False,
        ),
    ],
    "blocks": Annotated[
        str | None,
        typer.Option(
            help="FIRST:LAST, the blocks that may be pruned, LAST excluded; `4:30` protects the ends.",
            show_default=False,
        ),
    ],
    "calibration": Annotated[
        str | None,
        typer.Option(
            help="`self` (text the model writes itself), a .txt, .jsonl or .parquet file, "
            "`hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]`, `python-docs`, or .safetensors with input_ids (N, T). [default: self]",
            show_default=False,
        ),
    ],
    "windows": Annotated[
        int | None, typer.Option(help="How many calibration windows. [default: 32]", show_default=False)
    ],
    "window_length": Annotated[int | None, typer.Option(help="Tokens in a window. [default: 256]", show_default=False)],
    "seed": Annotated[int | None, typer.Option(help="Seed of everything random. [default: 0]", show_default=False)],
    "micro_batch": Annotated[
        int | None, typer.Option(help="Windows that run through a block at once. [default: 1]", show_default=False)
    ],
    "memory": Annotated[
        str | None,
        typer.Option(
            help="What the run may take at most, such as 4GiB; what does not fit goes to disk or is computed again, to the same "
            "result. [default: most of what is free]",
            show_default=False,
        ),
    ],
    "device": Annotated[
        str | None,
        typer.Option(
            help="auto (a GPU where there is one), cpu, cuda or cuda:N. On a GPU blocks compute in bfloat16. [default: auto]",
            show_default=False,
        ),
    ],
}
"""Every flag that shapes the choice; those left out are None, and the recipe's own default holds."""

RecipeOption = Annotated[
    Path | None, typer.Option(help="YAML with the same fields as these flags; flags win.", show_default=False)
]
RemoteOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]


def _together(value: Any) -> Any:
    """A flag that was given several times says all of it, not only the last."""
    return (",".join(dict.fromkeys(value)) or None) if isinstance(value, list) else value


SHARED_FLAGS = ("calibration", "windows", "window_length", "seed", "micro_batch", "memory", "device")
"""The flags that hold for all recipes of a comparison."""


def with_shared(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flags that hold for several recipes; it gets those that were given, by name, as ``shared``."""

    @functools.wraps(command)
    def called(**given: Any) -> None:
        command(shared={name: given.pop(name) for name in SHARED_FLAGS}, **given)

    keyword = inspect.Parameter.KEYWORD_ONLY
    own = inspect.signature(command, eval_str=True).parameters
    parameters = [parameter.replace(kind=keyword) for name, parameter in own.items() if name != "shared"]
    parameters += [inspect.Parameter(name, keyword, default=None, annotation=FLAGS[name]) for name in SHARED_FLAGS]
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def with_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every flag of a recipe; it is called with the recipe they make as ``chosen``."""

    @functools.wraps(command)
    def called(recipe: Path | None = None, trust_remote_code: bool = False, **given: Any) -> None:
        from secateur.recipe import recipe_from

        flags = {name: _together(given.pop(name)) for name in FLAGS}
        chosen = functools.partial(recipe_from, recipe, trust_remote_code=trust_remote_code or None, **flags)
        command(chosen=chosen, **given)

    annotations = {**FLAGS, "recipe": RecipeOption, "trust_remote_code": RemoteOption}
    keyword = inspect.Parameter.KEYWORD_ONLY
    shared = [inspect.Parameter(name, keyword, default=None, annotation=FLAGS[name]) for name in FLAGS]
    shared.append(inspect.Parameter("recipe", keyword, default=None, annotation=RecipeOption))
    shared.append(inspect.Parameter("trust_remote_code", keyword, default=False, annotation=RemoteOption))
    own = inspect.signature(command, eval_str=True).parameters
    mine = [parameter.replace(kind=keyword) for name, parameter in own.items() if name != "chosen"]
    called.__signature__ = inspect.Signature([*shared, *mine])  # type: ignore[attr-defined]
    called.__annotations__ = annotations | {parameter.name: parameter.annotation for parameter in mine}
    return called
