"""Writes ``docs/families.md`` from what the families' tests have found, when all of them have run and passed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from family_configs import FAMILIES

TABLE = Path(__file__).parents[1] / "docs" / "families.md"
TEXT = """# Families

Written by the test run itself (`tests/families`), one tiny random model for each family; nothing in the package knows any of
them by name. For every kind of unit one, many and unequal numbers were cut, and the cut model's logits compared with those of
the dense model with the same units masked out; the largest difference is {worst}, as a share of the largest logit. Every family
was then pruned three times (units inside the blocks; heads and channels unevenly; hidden channels and blocks), written, loaded by
plain transformers, in a process without Secateur too, and generated the same with and without a cache.

"Own config" loads in plain transformers. A "per-layer config" and a "carved" model carry a short modelling file: plain
transformers loads them with `trust_remote_code=True`, `secateur.load` without.

| family | class | units | cuts proved | units inside the blocks | heads and channels, uneven | hidden and blocks |
|---|---|---|---|---|---|---|
{rows}

## Refused, by name

{refused}
"""
_rows: dict[str, dict[str, Any]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for key, value in report.user_properties:
        if key == "family" and report.when == "call" and report.passed:
            _rows[value["name"]] = value


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput") or not _rows.keys() >= FAMILIES.keys():
        return
    rows = [_rows[name] for name in FAMILIES]
    lines = [
        f"| {row['name']} | `{row['class']}` | {', '.join(row['units'])} | {row['proofs']} | "
        + " | ".join(row["written"][run] for run in ("uniform", "uneven", "whole"))
        + " |"
        for row in rows
    ]
    refused = [f"* {row['name']}: {reason}." for row in rows for reason in row["refused"]]
    worst = "below 1e-5" if max(row["worst"] for row in rows) < 1e-5 else "below 1e-4"
    text = TEXT.format(worst=worst, rows="\n".join(lines), refused="\n".join(refused) or "Nothing.")
    if not TABLE.exists() or TABLE.read_text(encoding="utf-8") != text:
        TABLE.write_text(text, encoding="utf-8")
