"""Self-contained HTML pages: jinja2 templates, with matplotlib figures as inline SVG."""

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from .figures import figure_bytes

INK = "#010203"
"""A colour that `svg` replaces by the page's text colour, light or dark."""


def render(template: Path, **values: object) -> str:
    """A template file with its values, whose text is escaped, `Markup` excepted."""
    loader = FileSystemLoader(template.parent)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=loader)
    return environment.get_template(template.name).render(**values)


def svg(figure: Figure) -> Markup:
    """A figure as an inline <svg> without links, on the page's own ground, the same text for the
    same figure."""
    for part in (figure, *figure.axes):
        part.set_facecolor("none")
    whole = figure_bytes(figure, ".svg").decode()
    text = whole.partition("?>")[2].partition(">")[2]  # without XML and doctype headers
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)  # HTML needs none
    return Markup(text.replace(INK, "currentColor"))
