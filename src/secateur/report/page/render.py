"""From facts to one file of HTML, with everything in it."""

from __future__ import annotations

import html
import json
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from secateur.report.page.library import charting_script

NO_NETWORK = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; img-src data:"
"""The page may load nothing, whatever is in it; Vega compiles its expressions."""


def render(template: str, **facts: Any) -> str:
    """The page of ``template``; every text in ``facts`` is escaped."""
    environment = Environment(
        loader=PackageLoader("secateur.report.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["spec"] = _as_script
    environment.filters["code"] = lambda text: Markup(f"<pre><code>{html.escape(text.strip())}</code></pre>")
    return environment.get_template(template).render(library=Markup(charting_script()), policy=NO_NETWORK, **facts)


def _as_script(spec: Any) -> Markup:
    """JSON that may stand inside a script element."""
    text = json.dumps(spec, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))
