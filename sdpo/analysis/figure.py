"""Figures of a signal: token strips, and heatmaps of many responses.

A strip has a box for each of a response's first tokens, in the colour of its advantage; one strip
for each condition. A heatmap has a row for each response and a cell for each token, one heatmap for
each condition. All of a figure has one scale: red where the follow-up makes a token less likely,
blue where likelier, white at 0.

Places are in inches from the figure's upper left corner. Tokens are set in a typeface of one width,
so that boxes fit their texts without asking a renderer.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from .signal import ComparedSignal

Scale = Literal["data", "paper"]

COLOURS = LinearSegmentedColormap.from_list(
    "signal", ["#b2182b", "#ffffff", "#2166ac"], N=257
).with_extremes(bad="#d9d9d9")
"""An odd number of colours has one in the middle: pure white."""
QUANTILE = 0.98
"""Of |A| in the figure, at which the scale of the data ends."""
SMALLEST = 0.01
"""Nats at which it ends at least: a signal of nothing but rounding stays white."""
PAPER = (-15.0, 3.0)
"""Nats at which the paper's scale ends, arXiv:2603.12273."""
TOKENS = 130
"""Columns of a heatmap."""
STRIP_TOKENS = 32
"""Boxes of a strip."""
LONGEST, LABEL = 24, 19
"""Characters that are shown: of a token, of a label."""

WIDTH, MARGIN, LABELS = 10.0, 0.15, 1.35
"""The figure, its border, and the column of labels."""
SIZE = 7.0
"""Of type, in points."""
MONO = FontProperties(family="DejaVu Sans Mono", size=SIZE)
BOLD = FontProperties(family="DejaVu Sans Mono", size=SIZE, weight="bold")
ADVANCE = 0.6021 * SIZE / 72
"""Width of a character of MONO."""
BOX, LINE, ROW, GAP = 0.17, 0.14, 0.12, 0.18
"""Heights: a token's box, a line of text, a heatmap's row, the space between parts."""
COLUMNS = 2
"""Heatmaps side by side."""


def draw(rows: Sequence[ComparedSignal], *, scale: Scale = "data", strips: int = 2) -> Figure:
    """Strips of the first responses, and heatmaps of all.

    Args:
        rows: at least one; all have the same conditions.
        scale: data: ends at a quantile of |A| on both sides of 0; paper: from -15 to 3 nats, each
            side with a slope of its own.
        strips: number of responses to draw as strips.
    """
    assert rows, "nothing to draw"
    norm = scale_of(rows, scale)
    panels = [list(_strip_lines(row)) for row in rows[:strips]]
    heat = _heatmap_height(rows)
    height = MARGIN + sum(map(_strip_height, rows[:strips], panels)) + heat + 0.75
    figure = Figure(figsize=(WIDTH, height))
    page = figure.add_axes((0, 0, 1, 1))
    page.set(xlim=(0, WIDTH), ylim=(height, 0))
    page.set_axis_off()
    y = MARGIN
    for n, (row, lines) in enumerate(zip(rows, panels, strict=False)):
        _draw_strips(page, y, n, row, lines, norm)
        y += _strip_height(row, lines)
    _draw_heatmaps(figure, page, y, rows, norm)
    _draw_scale(figure, page, y + heat, norm)
    return figure


def scale_of(rows: Sequence[ComparedSignal], scale: Scale) -> TwoSlopeNorm:
    """From advantages to [0, 1], with 0 in the middle; beyond its ends the colour stays."""
    if scale == "paper":
        return TwoSlopeNorm(0, *PAPER)
    advantages = [a for row in rows for c in row["conditions"].values() for a in c["advantage"]]
    end = max(SMALLEST, float(np.quantile(np.abs(advantages), QUANTILE)))
    return TwoSlopeNorm(0, -end, end)


def heatmap(rows: Sequence[ComparedSignal], condition: str) -> NDArray[np.float64]:
    """(rows, columns): advantages under a condition, NaN behind a response's end."""
    columns = _columns(rows)
    values = np.full((len(rows), columns), np.nan)
    for n, row in enumerate(rows):
        advantage = row["conditions"][condition]["advantage"][:columns]
        values[n, : len(advantage)] = advantage
    return values


def _columns(rows: Sequence[ComparedSignal]) -> int:
    return min(TOKENS, max(len(row["tokens"]) for row in rows))


# Strips


def _strip_lines(row: ComparedSignal) -> Iterator[list[tuple[int, str]]]:
    """The first tokens, by lines: index, and text as it is shown."""
    line, x = [], 0.0
    for t, token in enumerate(row["tokens"][:STRIP_TOKENS]):
        text = shown_token(token)
        if line and x + _box_width(text) > WIDTH - LABELS - MARGIN:
            yield line
            line, x = [], 0.0
        line.append((t, text))
        x += _box_width(text)
    yield line


def _box_width(text: str) -> float:
    return (len(text) + 1) * ADVANCE


def _strip_height(row: ComparedSignal, lines: Sequence[object]) -> float:
    conditions = len(row["conditions"])
    texts = LINE * (1.5 + conditions)
    return texts + len(lines) * (conditions * BOX + LINE / 2) + GAP


def _draw_strips(
    page: Axes,
    y: float,
    n: int,
    row: ComparedSignal,
    lines: Sequence[Sequence[tuple[int, str]]],
    norm: TwoSlopeNorm,
) -> None:
    """The response of a row, and what was said under each condition."""
    _write(page, MARGIN, y, row["id"], 130, font=BOLD)
    for c, (name, condition) in enumerate(row["conditions"].items()):
        at = y + LINE * (c + 1.25)
        _write(page, MARGIN, at, name, LABEL)
        _write(page, LABELS, at, " ".join(condition["followup"].split()) or "(no text)", 130)
    y += LINE * (1.5 + len(row["conditions"]))
    for line in lines:
        for c, (name, condition) in enumerate(row["conditions"].items()):
            at, x = y + c * BOX, LABELS
            _write(page, MARGIN, at + 0.03, name, LABEL)
            for t, text in line:
                _draw_box(page, x, at, text, norm(condition["advantage"][t]), f"{n}-{name}-{t}")
                x += _box_width(text)
        y += len(row["conditions"]) * BOX + LINE / 2


def _draw_box(page: Axes, x: float, y: float, text: str, value: float, gid: str) -> None:
    """A token on its colour; ``gid`` is its id in an SVG."""
    colour = COLOURS(value)
    dark = np.dot(colour[:3], (0.2126, 0.7152, 0.0722)) < 0.45
    box = Rectangle((x, y), _box_width(text), BOX, gid=f"token-{gid}")
    box.set(facecolor=colour, edgecolor="#969696", linewidth=0.3)
    page.add_patch(box)
    ink = "white" if dark else "black"
    _write(page, x + ADVANCE / 2, y + 0.03, text, LONGEST, color=ink)


def shown_token(token: str) -> str:
    """A token in one line, as a box shows it."""
    return _shown(token.replace("\n", "↵").replace("\t", "→"), LONGEST)


def _write(
    page: Axes,
    x: float,
    y: float,
    text: str,
    limit: int,
    *,
    font: FontProperties = MONO,
    color: str = "black",
) -> None:
    """Text below y."""
    shown = _shown(text, limit)
    page.text(x, y, shown, va="top", color=color, fontproperties=font, parse_math=False)


def _shown(text: str, limit: int) -> str:
    """With a hollow box for what the typeface lacks, and cut to so many characters."""
    whole = "".join(c if _has_glyph(c) else "□" for c in text)
    return whole if len(whole) <= limit else whole[: limit - 1] + "…"


@cache
def _has_glyph(character: str) -> bool:
    return get_font(findfont(MONO)).get_char_index(ord(character)) != 0


# Heatmaps


def _heatmap_height(rows: Sequence[ComparedSignal]) -> float:
    lines = -(-len(rows[0]["conditions"]) // COLUMNS)
    return lines * (len(rows) * ROW + LINE * 2.6 + GAP)


def _draw_heatmaps(
    figure: Figure, page: Axes, y: float, rows: Sequence[ComparedSignal], norm: TwoSlopeNorm
) -> None:
    width = (WIDTH - LABELS - MARGIN - (COLUMNS - 1) * GAP) / COLUMNS
    height = len(rows) * ROW
    for n, condition in enumerate(rows[0]["conditions"]):
        line, column = divmod(n, COLUMNS)
        top = y + line * (height + LINE * 2.6 + GAP) + LINE * 1.3
        left = LABELS + column * (width + GAP)
        _write(page, left, top - LINE * 1.1, condition, 2 * LABEL, font=BOLD)
        axes = figure.add_axes(_place(figure, left, top, width, height))
        values = heatmap(rows, condition)
        extent = (0, values.shape[1], len(rows), 0)
        image = axes.imshow(
            COLOURS(norm(np.ma.masked_invalid(values))),
            aspect="auto",
            interpolation="none",
            extent=extent,
        )
        image.set_gid(f"heatmap-{condition}")
        axes.set_yticks([])
        axes.tick_params(labelsize=SIZE, length=2, width=0.5, pad=1)
        for r, row in enumerate(rows if column == 0 else ()):
            _write(page, MARGIN, top + r * ROW, row["id"], LABEL)


def _place(
    figure: Figure, left: float, top: float, width: float, height: float
) -> tuple[float, float, float, float]:
    """Inches from the upper left corner -> what `add_axes` takes."""
    w, h = figure.get_size_inches()
    return left / w, 1 - (top + height) / h, width / w, height / h


def _draw_scale(figure: Figure, page: Axes, y: float, norm: TwoSlopeNorm) -> None:
    axes = figure.add_axes(_place(figure, LABELS, y + 0.15, 4.0, 0.12))
    low, high = float(norm.vmin or 0), float(norm.vmax or 0)
    ticks = [low, low / 2, 0, high / 2, high]
    bar = figure.colorbar(ScalarMappable(norm, COLOURS), axes, orientation="horizontal")
    bar.set_ticks(ticks, labels=[f"{tick:+.2g}" if tick else "0" for tick in ticks])
    axes.tick_params(labelsize=SIZE, length=2, width=0.5, pad=1)
    says = "advantage in nats; beyond its ends the colour stays; grey: no token"
    _write(page, LABELS + 4.3, y + 0.15, says, 130)
