"""Put the benchmarks' newest tables into README.md, between the comments that name them.

python benchmarks/figures.py
"""

from __future__ import annotations

import re

from common import RESULTS, ROOT

PLACE = re.compile(r"(<!-- (?P<file>[\w-]+\.md) -->\n).*?(<!-- end of (?P=file) -->)", re.DOTALL)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(PLACE.sub(lambda found: found[1] + _table(found["file"]) + found[3], text), encoding="utf-8")


def _table(file: str) -> str:
    return "\n" + (RESULTS / file).read_text(encoding="utf-8").strip() + "\n\n"


if __name__ == "__main__":
    main()
