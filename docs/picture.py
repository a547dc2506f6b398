"""Draw docs/demo.svg from what a run of the demo printed:

secateur demo 2>&1 | tee demo.log && python docs/picture.py demo.log
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

console = Console(record=True, width=82, file=open("/dev/null", "w"))
console.print(Text("$ make demo", style="bold"))
for line in Path(sys.argv[1]).read_text().splitlines():
    console.print(Text(line), soft_wrap=False)
console.save_svg(str(Path(__file__).with_name("demo.svg")), title="secateur")
