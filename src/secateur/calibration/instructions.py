"""Rows of an instruction, an input and an output, as the text that models are tuned on.

The template is the one that Stanford Alpaca published (github.com/tatsu-lab/stanford_alpaca), which LLM-Pruner and SPP tune on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from secateur.errors import CalibrationError

WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
{output}"""

WITHOUT_INPUT = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
{output}"""


def are_instructions(columns: Collection[str]) -> bool:
    """Whether rows with these columns are instructions; a column "text" holds what is meant to be read."""
    return {"instruction", "output"} <= set(columns) and "text" not in columns


def instruction_text(row: Mapping[str, Any], where: str) -> str:
    """The whole text of one row, prompt and answer; without an input the shorter template.

    Raises:
        CalibrationError: a part is not there, or no string.
    """
    parts = {name: row.get(name) for name in ("instruction", "output")} | {"input": row.get("input") or ""}
    for name, value in parts.items():
        if not isinstance(value, str):
            what = "no" if value is None else f"an '{name}' that is not a string but {type(value).__name__}, and no"
            raise CalibrationError(f"{where} has {what} '{name}' to learn from; mend or remove that row")
    return (WITH_INPUT if parts["input"] else WITHOUT_INPUT).format(**parts)
