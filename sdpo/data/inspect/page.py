"""An `Inspection` as one HTML page that needs nothing else."""

from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from markupsafe import Markup


from .inspection import BINS, Inspection, Lengths, Origins, Preparation
from .tables import LISTED, all_lengths, number, sections_of


def to_html(inspection: Inspection) -> str:
    """One page that needs nothing else; colours follow the reader's light or dark setting."""
    from ...io.html import render

    sections = sections_of(inspection)
    return render(
        PAGE,
        inspection=inspection,
        cards=_cards(inspection),
        lengths={
            name: [number(x) for x in (n.min, n.median, n.mean, n.p95, n.max)]
            for name, n in all_lengths(inspection).items()
        },
        waterfall=_waterfall(inspection.preparation),
        plots=_plots(inspection),
        bars={
            title: _bars(counts)
            for title, counts in _categories(inspection.origins).items()
            if counts
        },
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


def _categories(origins: Origins | None) -> dict[str, dict[str, int]]:
    return {"Languages": origins.languages, "Models": origins.models} if origins else {}


def _bars(counts: Mapping[str, int]) -> list[dict[str, Any]]:
    total = sum(counts.values())
    shown = dict(islice(counts.items(), LISTED))
    if rest := total - sum(shown.values()):
        shown[f"{len(counts) - len(shown)} more"] = rest
    return [{"name": name, "n": n, "width": 100 * n / total} for name, n in shown.items()]


def _plots(inspection: Inspection) -> "dict[str, Markup]":
    tokens, made = inspection.tokens, inspection.preparation
    limits = made.limits if made else {}
    plots = {"Lengths in characters": _histograms(inspection.characters, limits)}
    if tokens and tokens.lengths:
        plots["Lengths in tokens, with training's limits"] = _histograms(
            tokens.lengths, tokens.limits
        )
    plots["Turns"] = _histograms(inspection.turns, {})
    return plots


def _histograms(lengths: Mapping[str, Lengths], limits: Mapping[str, int]) -> "Markup":
    """Side by side; a limit is a dashed line. Wide ranges have a logarithmic axis."""
    from matplotlib.figure import Figure

    from ...io.html import svg

    figure = Figure(figsize=(11, 2.5), layout="constrained", facecolor="none")
    for ax, (name, n) in zip(figure.subplots(1, len(lengths)), lengths.items(), strict=True):
        _draw_histogram(ax, n, limits.get(name))
        ax.set_title(name, fontsize=10)
    for ax in figure.axes:
        _in_the_pages_ink(ax)
    return svg(figure)


def _draw_histogram(ax: Any, n: Lengths, limit: int | None) -> None:
    from matplotlib.ticker import StrMethodFormatter, SymmetricalLogLocator

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


def _in_the_pages_ink(ax: Any) -> None:
    from ...io.html import INK

    ax.set_facecolor("none")
    ax.tick_params(colors=INK, labelsize=7)
    ax.minorticks_off()
    ax.title.set_color(INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(INK)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ inspection.file }}</title>
<style>
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 15%, transparent);
  --soft: color-mix(in srgb, currentColor 6%, transparent) }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
.note { opacity: .7; margin: .2rem 0 } svg { width: 100%; height: auto }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0 }
.card { border: 1px solid var(--line); border-radius: .6rem; padding: .6rem 1.1rem }
.card b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums }
table { border-collapse: collapse } td, th { padding: .25rem .8rem; text-align: left;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere }
.number { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: normal }
.bars { display: grid; grid-template-columns: minmax(8rem, 18rem) 1fr 7rem; gap: .25rem .8rem;
  align-items: center }
.bars > span { overflow-wrap: anywhere } .track { background: var(--soft); border-radius: .2rem }
.bar { display: block; height: 1.1rem; min-width: 2px; border-radius: .2rem; background: #3b82c4 }
.lost { background: #d97706 }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 0 3rem }
.sample { border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; margin: 1rem 0;
  display: flex; flex-direction: column; gap: .6rem }
.sample header { opacity: .7; font: 13px ui-monospace, monospace; overflow-wrap: anywhere }
.turn { max-width: 85%; padding: .5rem .9rem; border-radius: .9rem; background: var(--soft);
  white-space: pre-wrap; overflow-wrap: anywhere }
.turn small { display: block; opacity: .7 } .assistant, .answer { align-self: flex-start }
.user, .followup { align-self: flex-end } .system { align-self: center; font-style: italic }
.answer { outline: 2px solid #3b82c4 } .followup { outline: 2px solid #d97706 }
</style></head><body>
<h1>{{ inspection.file }}</h1>
{% for note in inspection.notes %}
<p class="note">{{ note }}</p>
{% endfor %}
<div class="cards">
{% for name, n in cards.items() %}
<div class="card"><b>{{ n }}</b>{{ name }}</div>
{% endfor %}
</div>
{% if waterfall %}
<h2>From the log to the file: conversations</h2>
<div class="bars">
{% for bar in waterfall %}
<span>{{ bar.name }}</span><span class="track"><span class="bar{{ ' lost' if bar.n < 0 }}"
  style="margin-left:{{ '%.2f' | format(bar.left) }}%;width:{{ '%.2f' | format(bar.width) }}%">
</span></span><span class="number">{{ '{:,}'.format(bar.n) }}</span>
{% endfor %}
</div>
{% endif %}
{% for title, plot in plots.items() %}
<h2>{{ title }}</h2>
{{ plot }}
{% endfor %}
<h2>Lengths</h2>
<table><tr><th></th><th class="number">min</th><th class="number">median</th>
<th class="number">mean</th><th class="number">p95</th><th class="number">max</th></tr>
{% for name, figures in lengths.items() %}
<tr><td>{{ name }}</td>{% for x in figures %}<td class="number">{{ x }}</td>{% endfor %}</tr>
{% endfor %}
</table>
<div class="columns">
{% for title, shown in bars.items() %}
<section><h2>{{ title }}</h2><div class="bars">
{% for bar in shown %}
<span>{{ bar.name }}</span><span class="track"><span class="bar"
  style="width:{{ '%.2f' | format(bar.width) }}%"></span></span>
<span class="number">{{ '{:,}'.format(bar.n) }}</span>
{% endfor %}
</div></section>
{% endfor %}
{% for title, rows in sections.items() %}
<section><h2>{{ title[:1] | upper }}{{ title[1:] }}</h2><table>
{% for what, figure in rows %}
<tr><td>{{ what }}</td><td class="number">{{ figure }}</td></tr>
{% endfor %}
</table></section>
{% endfor %}
</div>
{% if inspection.samples %}
<h2>Samples</h2>
{% endif %}
{% for sample in inspection.samples %}
<article class="sample"><header>{{ sample.id }}</header>
{% for role, text in sample.prompt %}
<div class="turn {{ role }}"><small>{{ role }}</small>{{ text }}</div>
{% endfor %}
<div class="turn answer"><small>answer y</small>{{ sample.completion }}</div>
<div class="turn followup"><small>follow-up o</small>{{ sample.user_response }}</div>
</article>
{% endfor %}
</body></html>
"""
