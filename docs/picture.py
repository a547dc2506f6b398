"""Draw docs/demo.svg from what a run of the demo printed:

secateur demo 2>&1 | tee demo.log && python docs/picture.py demo.log
"""

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

console = Console(record=True, width=82, file=io.StringIO())
console.print(Text("$ make demo", style="bold"))
for line in Path(sys.argv[1]).read_text().splitlines():
    console.print(Text(line), soft_wrap=False)
svg = console.export_svg(title="secateur")
# the fonts would be fetched from elsewhere; the reader's own monospace does
svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
Path(__file__).with_name("demo.svg").write_text(svg)
