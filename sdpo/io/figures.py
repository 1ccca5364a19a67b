"""matplotlib figures as files: the same bytes for the same figure."""

import io
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from ..errors import SdpoError
from .files import write_bytes

FORMATS = {".svg": dict.fromkeys(("Date", "Creator", "Format", "Type")), ".png": {"Software": None}}
"""Suffix -> metadata that would differ from one writing, or one version, to the next."""
DPI = 150
"""Pixels per inch of a PNG."""


def check_figure_path(path: str | Path) -> None:
    """Refuse a file whose suffix names no known format.

    Raises:
        SdpoError: it ends in neither .svg nor .png.
    """
    if Path(path).suffix not in FORMATS:
        raise SdpoError(f"{path}: a figure's name must end in {' or '.join(FORMATS)}")


def figure_bytes(figure: Figure, suffix: str) -> bytes:
    """A figure in the format of a suffix."""
    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "sdpo"}):
        figure.savefig(out, format=suffix[1:], dpi=DPI, metadata=FORMATS[suffix])
    return out.getvalue()


def write_figure(path: str | Path, figure: Figure) -> None:
    """Write a figure as SVG or PNG, as its name ends, whole or not at all."""
    check_figure_path(path)
    write_bytes(path, figure_bytes(figure, Path(path).suffix))
