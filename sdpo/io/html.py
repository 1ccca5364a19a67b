"""Self-contained HTML pages: jinja2 templates, and matplotlib's figures as inline SVG."""

import io
import re

import matplotlib
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure

INK = "#010203"
"""A colour that `svg` turns into the page's text colour, light or dark."""


def render(template: str, **values: object) -> str:
    """The template with its values; all text in them is escaped, `Markup` excepted."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(**values)


def svg(figure: Figure) -> Markup:
    """A figure as an inline <svg>, the same for the same figure, without links to anywhere."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "sdpo"}):
        figure.savefig(out, format="svg", metadata=nothing)
    text = out.getvalue().partition("?>")[2].partition(">")[2]  # without XML and doctype headers
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)  # HTML knows them
    return Markup(text.replace(INK, "currentColor"))
