"""What is drawn is what was computed, and texts stay apart."""

import base64
import io
import re
import xml.etree.ElementTree as ET

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Rectangle

from sdpo.analysis.figure import COLOURS, STRIP_TOKENS, draw, heatmap, scale_of, shown_token
from sdpo.analysis.signal import ComparedSignal
from sdpo.io.figures import figure_bytes

RED, WHITE, BLUE = "#b2182b", "#ffffff", "#2166ac"


def row(
    id: str, own: list[float], other: list[float], tokens: list[str] | None = None
) -> ComparedSignal:
    said = {"own": ("Shorter, please.", own), "irrelevant": ("What time is it?", other)}
    return ComparedSignal(
        id=id,
        token_ids=list(range(len(own))),
        tokens=tokens or [f" t{n}" for n in range(len(own))],
        logp_policy=[-1.0] * len(own),
        logp_hindsight=[a - 1.0 for a in own],
        advantage=own,
        conversation=id,
        kind="",
        conditions={n: {"followup": text, "advantage": a} for n, (text, a) in said.items()},
    )


def fills(svg: bytes) -> dict[str, str]:
    """Id of a token's box -> its colour."""
    boxes = [e for e in ET.fromstring(svg).iter() if e.get("id", "").startswith("token-")]
    return {
        box.attrib["id"]: re.findall(r"fill: (#\w+)", box[0].attrib["style"])[0] for box in boxes
    }


def pixels(svg: bytes, condition: str) -> np.ndarray:
    """(rows, columns, 3) of a heatmap, from 0 to 1."""
    (image,) = [e for e in ET.fromstring(svg).iter() if e.get("id") == f"heatmap-{condition}"]
    (data,) = [value for name, value in image.attrib.items() if name.endswith("href")]
    png = base64.b64decode(data.partition("base64,")[2])
    return matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3]


@pytest.mark.parametrize(
    ("nats", "colour"),
    [(-99, RED), (-15, RED), (0, WHITE), (3, BLUE), (99, BLUE)]
    + [(-7.5, to_hex(COLOURS(0.25))), (1.5, to_hex(COLOURS(0.75)))],
)
def test_the_papers_scale(nats, colour):
    assert to_hex(COLOURS(scale_of([], "paper")(nats))) == colour


def test_the_datas_scale_is_symmetric_and_ends_at_a_quantile_of_all_conditions():
    values = np.linspace(-4, 2, 601)
    norm = scale_of([row("a", list(values[:300]), list(values[301:601]))], "data")
    assert norm.vmin == -norm.vmax == pytest.approx(-3.88, abs=0.01)  # 98% of |A| are below
    assert to_hex(COLOURS(norm(0.0))) == WHITE
    still = scale_of([row("a", [0.0, 1e-7], [0.0, -1e-7])], "data")
    assert to_hex(COLOURS(still(1e-7))) == WHITE, "rounding is no signal"


def test_boxes_and_cells_have_the_colours_of_their_values():
    """Read back from the SVG."""
    rows = [row("a", [-15.0, 0.0, 3.0], [0.0, 1.5, -7.5]), row("b", [3.0, -15.0], [0.0, 0.0])]
    svg = figure_bytes(draw(rows, scale="paper", strips=1), ".svg")
    half_red, half_blue = to_hex(COLOURS(0.25)), to_hex(COLOURS(0.75))
    expected = {"own": [RED, WHITE, BLUE], "irrelevant": [WHITE, half_blue, half_red]}
    assert fills(svg) == {
        f"token-0-{name}-{t}": colour
        for name, colours in expected.items()
        for t, colour in enumerate(colours)
    }
    grey = to_hex(COLOURS.get_bad())
    cells = {"own": [[RED, WHITE, BLUE], [BLUE, RED, grey]]}
    cells["irrelevant"] = [[WHITE, half_blue, half_red], [WHITE, WHITE, grey]]
    for name, colours in cells.items():
        expected = [[to_rgb(colour) for colour in line] for line in colours]
        assert np.abs(pixels(svg, name) - expected).max() < 1.1 / 255, name


def test_a_heatmap_is_cut_and_filled():
    values = heatmap([row("a", [1.0] * 200, [2.0] * 200), row("b", [3.0], [4.0])], "irrelevant")
    assert values.shape == (2, 130) and (values[0] == 2).all()
    assert values[1, 0] == 4 and np.isnan(values[1, 1:]).all()


def test_the_same_rows_are_the_same_bytes():
    rows = [row("a", [-1.0, 0.5], [0.1, 0.2])]
    for suffix in (".svg", ".png"):
        assert figure_bytes(draw(rows), suffix) == figure_bytes(draw(rows), suffix)


def test_no_texts_overlap_whatever_the_tokens_are():
    tokens = [
        "Hello",
        " $x^2$",
        "日本",
        "\n\n",
        "",
        " " * 9,
        "w" * 70,
        "\u0301",
        "🦊",
        "\\frac",
        "a_b",
    ]
    tokens = (tokens * 9)[: STRIP_TOKENS + 5]
    values = list(np.random.default_rng(0).normal(size=len(tokens)))
    rows = [row(f"an-id-that-is-far-too-long-{n}", values, values, tokens) for n in range(9)]
    for r in rows:
        r["conditions"] |= {
            f"an irrelevant one, number {n}": r["conditions"]["own"] for n in (1, 2)
        }
        r["conditions"]["own"]["followup"] = "so many words " * 90
    figure = draw(rows)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # a glyph that is missing would warn, and warnings are looked at below
    renderer = canvas.get_renderer()
    page = figure.axes[0]
    texts = [t for axes in figure.axes for t in axes.texts if t.get_text().strip()]
    for axes in figure.axes[1:]:
        low, high = axes.get_xlim()
        texts += [t for t in axes.get_xticklabels() if low <= t.get_position()[0] <= high]
    spans = [t.get_window_extent(renderer) for t in texts]
    assert len(spans) > 2 * 4 * STRIP_TOKENS
    whole = figure.bbox
    for n, span in enumerate(spans):
        inside = whole.x0 <= span.x0 and span.x1 <= whole.x1
        assert inside and whole.y0 <= span.y0 and span.y1 <= whole.y1, texts[n]
        for m, other in enumerate(spans[:n]):
            apart = span.x1 <= other.x0 + 1 or other.x1 <= span.x0 + 1
            apart |= span.y1 <= other.y0 + 3 or other.y1 <= span.y0 + 3  # line heights have air
            assert apart, (texts[n], texts[m])
    boxes = [p for p in page.patches if isinstance(p, Rectangle)]
    assert len(boxes) == 2 * 4 * STRIP_TOKENS


@pytest.mark.filterwarnings("error:Glyph")
def test_characters_that_the_typeface_lacks_are_boxes():
    assert shown_token(" é日\n$") == " é□↵$" and shown_token("x" * 30) == "x" * 23 + "…"
    figure_bytes(draw([row("日", [0.0], [0.0], ["日"])]), ".png")
