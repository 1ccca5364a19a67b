"""An `Inspection` as one self-contained HTML page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter, SymmetricalLogLocator

from ...io.html import INK, render, svg
from .inspection import BINS, Inspection, Lengths, Preparation
from .tables import length_rows, most, sections_of

TEMPLATE = Path(__file__).with_name("page.html.j2")


def to_html(inspection: Inspection) -> str:
    """The page; its colours follow the reader's light or dark setting."""
    origins, sections = inspection.origins, sections_of(inspection)
    categories = {"Languages": origins.languages, "Models": origins.models} if origins else {}
    return render(
        TEMPLATE,
        inspection=inspection,
        cards=_cards(inspection),
        lengths=length_rows(inspection),
        waterfall=_waterfall(inspection.preparation),
        plots=_plots(inspection),
        bars={title: _bars(counts) for title, counts in categories.items() if counts},
        sections={t: rows for t, rows in sections.items() if rows and t not in _DRAWN},
    )


_DRAWN = ("languages (interactions)", "models (interactions)")


def _cards(inspection: Inspection) -> dict[str, str]:
    cards = {"interactions": inspection.interactions, "conversations": inspection.conversations}
    if inspection.users:
        cards["users"] = inspection.users
    if inspection.preparation:
        cards["conversations examined"] = inspection.preparation.examined
    return {name: f"{n:,}" for name, n in cards.items()}


def _waterfall(made: Preparation | None) -> list[dict[str, Any]]:
    """Bars from all conversations down to the kept ones; left and width in percent."""
    if made is None or not made.examined:
        return []
    left, bars = made.examined, [{"name": "examined", "n": made.examined, "left": 0.0}]
    for reason, n in made.drops.items():
        left -= n
        bars.append({"name": reason, "n": -n, "left": 100 * left / made.examined})
    bars.append({"name": "kept", "n": made.kept, "left": 0.0})
    return [{**bar, "width": 100 * abs(bar["n"]) / made.examined} for bar in bars]


def _bars(counts: Mapping[str, int]) -> list[dict[str, Any]]:
    total = sum(counts.values())
    return [{"name": name, "n": n, "width": 100 * n / total} for name, n in most(counts).items()]


def _plots(inspection: Inspection) -> dict[str, Markup]:
    tokens, made = inspection.tokens, inspection.preparation
    limits = made.limits if made else {}
    plots = {"Lengths in characters": _histograms(inspection.characters, limits)}
    if tokens and tokens.lengths:
        plots["Lengths in tokens, with training's limits"] = _histograms(
            tokens.lengths, tokens.limits
        )
    plots["Turns"] = _histograms(inspection.turns, {})
    return plots


def _histograms(lengths: Mapping[str, Lengths], limits: Mapping[str, int]) -> Markup:
    """Histograms side by side, limits as dashed lines; wide ranges have a logarithmic axis."""
    figure = Figure(figsize=(11, 2.5), layout="constrained", facecolor="none")
    for ax, (name, n) in zip(figure.subplots(1, len(lengths)), lengths.items(), strict=True):
        _draw_histogram(ax, n, limits.get(name))
        ax.set_title(name, fontsize=10)
    return svg(figure)


def _draw_histogram(ax: Axes, n: Lengths, limit: int | None) -> None:
    wide = n.max > BINS
    ax.stairs(n.counts, np.array(n.edges) - (0 if wide else 0.5), fill=True, color="#3b82c4")
    if wide:
        ax.set_xscale("symlog", linthresh=1)
        ax.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        ax.set_xlim(max(n.min, 1) / 1.3, n.max * 1.3)
    if limit is not None and n.max * 2 > limit:
        ax.axvline(limit, color="#d97706", linestyle="--")
        ax.set_xlim(right=max(n.max, limit) * 1.3)
    ax.set_facecolor("none")
    ax.tick_params(colors=INK, labelsize=7)
    ax.minorticks_off()
    ax.title.set_color(INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(INK)
