"""The charting library as one script, to be written into a page: Vega, Vega-Lite and Vega-Embed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from secateur.errors import OutputError
from secateur.files import atomic_file, cache_folder

_MAKE = """
import sys, vl_convert
with open(sys.argv[1], "w", encoding="utf-8") as script:
    script.write(vl_convert.javascript_bundle())
"""


def charting_script() -> str:
    """The library's JavaScript, which puts ``vegaEmbed`` into ``window``; made once for each of its versions and kept.

    It is made in a process of its own: vl-convert brings a JavaScript engine, whose 150 MiB are none of a run's.

    Raises:
        OutputError: it cannot be made.
    """
    file = cache_folder() / "page" / f"vega-{version('vl-convert-python')}.js"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as temporary:
            _make(temporary)
    # What ends a script element early must not stand in it.
    return file.read_text(encoding="utf-8").replace("</script", "<\\/script")


def _make(file: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-c", _MAKE, str(file)],
        capture_output=True,
        text=True,
        env={**os.environ, "RUST_BACKTRACE": "0"},
    )
    if made.returncode:
        said = made.stderr.strip().splitlines()
        raise OutputError(
            f"the page's charts cannot be drawn: vl-convert ended with {said[-1] if said else made.returncode}; install it again with: "
            "pip install --force-reinstall vl-convert-python"
        )
