"""Take the pictures of the pages: docs/NAME.png as on a desk, docs/NAME-phone.png as on a phone.

    python docs/screenshots.py run=smaller/report.html recovered=recovered/report.html comparison=compared/report.html

Needs playwright and a Chromium on the PATH.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parent
SCREENS = {"": (1280, 1500), "-phone": (390, 1700)}
"""Width of each, and how much of the page is shown at the most."""


def main() -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for words in sys.argv[1:]:
            name, _, file = words.partition("=")
            for suffix, (width, most) in SCREENS.items():
                page = browser.new_page(viewport={"width": width, "height": 900})
                page.goto(Path(file).resolve().as_uri())
                page.wait_for_selector("body[data-drawn]")
                height = min(most, page.evaluate("document.documentElement.scrollHeight"))
                clip = {"x": 0, "y": 0, "width": width, "height": height}
                page.screenshot(path=DOCS / f"{name}{suffix}.png", full_page=True, clip=clip)
                page.close()
        browser.close()


if __name__ == "__main__":
    main()
