"""Draws trie-row.svg, the picture of docs/prefixes.md, from the rows that the page's Python makes.

python docs/assets/trie_row.py
"""

import contextlib
import io
import re
from pathlib import Path

from sdpo_parallel.rows import Rows

HERE = Path(__file__).parent
PAGE, PICTURE = HERE.parent / "prefixes.md", HERE / "trie-row.svg"
CELL, LEFT, TOP, GAP = 34, 176, 164, 14
KINDS = dict.fromkeys("ab>", "x") | dict.fromkeys("cdef", "y") | dict.fromkeys("onm", "o")
STYLE = """
    .text { fill: #1f2328; }
    .soft { fill: #59636e; }
    .x { fill: #ddf4ff; stroke: #0969da; }
    .y { fill: #dafbe1; stroke: #1a7f37; }
    .o { fill: #fff1e5; stroke: #bc4c00; }
    .own { fill: #0969da; }
    .kept { fill: #8250df; }
    .unseen { fill: #f6f8fa; stroke: #d1d9e0; }
    @media (prefers-color-scheme: dark) {
      .text { fill: #f0f6fc; }
      .soft { fill: #9198a1; }
      .x { fill: #10233d; stroke: #4493f8; }
      .y { fill: #12261a; stroke: #3fb950; }
      .o { fill: #2d1b0e; stroke: #f0883e; }
      .own { fill: #4493f8; }
      .kept { fill: #ab7df8; }
      .unseen { fill: #151b23; stroke: #3d444d; }
    }
"""


def made() -> tuple[str, tuple[Rows, Rows]]:
    """What the page's Python prints, and the two rows that it ends with."""
    (python,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    names, said = {}, io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(python, names)
    return said.getvalue(), names["rows"]


def drawing(policy: Rows, hindsight: Rows) -> str:
    """The SVG: keys across, queries down."""
    slots = [
        (chr(token), place, end, rows is hindsight)
        for rows in (policy, hindsight)
        for token, place, end in zip(
            *(t[0].tolist() for t in (rows.tokens_BT, rows.place_BT, rows.end_BT)), strict=True
        )
    ]
    at = [n * CELL + GAP * later for n, (*_, later) in enumerate(slots)]
    side = at[-1] + CELL
    parts = []

    def text(x: float, y: float, words: object, kind: str = "text", anchor: str = "middle") -> None:
        told = f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
        words = str(words).replace("<", "&lt;").replace(">", "&gt;")
        parts.append(f"{told}>{words}</text>")

    def box(x: float, y: float, kind: str) -> None:
        size = f'width="{CELL - 4}" height="{CELL - 4}" rx="5"'
        parts.append(f'<rect class="{kind}" x="{x + 2:g}" y="{y + 2:g}" {size}/>')

    for name, later in (("the policy's slots", False), ("hindsight's slots", True)):
        first = next(x for x, slot in zip(at, slots, strict=True) if slot[3] == later)
        text(LEFT + first + 2, 32, name, anchor="start")
        text(16, TOP + first + 22, ("policy" if not later else "hindsight"), anchor="start")
        text(16, TOP + first + 40, "queries", "soft", "start")
    for words, y in (("token", 66), ("place", 98), ("end", 122)):
        text(LEFT - 12, y, words, "soft", "end")
    text(LEFT - 12, TOP - 8, "place", "soft", "end")
    for x, (letter, place, end, _) in zip(at, slots, strict=True):
        box(LEFT + x, 44, KINDS[letter])
        text(LEFT + x + CELL / 2, 66, letter)
        text(LEFT + x + CELL / 2, 98, place)
        text(LEFT + x + CELL / 2, 122, end, "soft")
    for y, (letter, query, _, from_hindsight) in zip(at, slots, strict=True):
        box(LEFT - 76, TOP + y, KINDS[letter])
        text(LEFT - 76 + CELL / 2, TOP + y + 22, letter)
        text(LEFT - 20, TOP + y + 22, query)
        for x, (_, key, end, of_hindsight) in zip(at, slots, strict=True):
            if of_hindsight and not from_hindsight:
                continue  # the policy's pass has no such keys
            seen = "own" if from_hindsight == of_hindsight else "kept"
            box(LEFT + x, TOP + y, seen if key <= query < end else "unseen")
    foot, corner = TOP + side + 30, LEFT + at[len(policy.tokens_BT[0])]
    for x, kind, words in (
        (LEFT, "own", "seen, of the same pass"),
        (LEFT + 230, "kept", "seen, kept by the policy's pass"),
        (LEFT + 500, "unseen", "not seen"),
    ):
        parts.append(
            f'<rect class="{kind}" x="{x}" y="{foot - 13}" width="16" height="16" rx="3"/>'
        )
        text(x + 24, foot, words, "soft", "start")
    middle = corner + (LEFT + side - corner) / 2
    text(middle, TOP + CELL * 4, "a key is seen where", "soft")
    text(middle, TOP + CELL * 4 + 26, "place[key] <= place[query]")
    text(middle, TOP + CELL * 4 + 48, "and place[query] < end[key]")
    width, height = LEFT + side + 20, foot + 20
    font = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
    head += f'aria-labelledby="title desc" font-family="{font}" font-size="15">'
    return "\n".join([head, *TOLD, f"  <style>{STYLE}  </style>", *parts, "</svg>", ""])


TOLD = [
    '  <title id="title">Two rows that share prefixes, and their mask</title>',
    '  <desc id="desc">The policy reads two turns of a conversation as one path of nine slots, and '
    "each sees all before it. Hindsight reads two branches of four slots. The first sees the two "
    "slots of the policy's row that hold the first message, the second the six up to the second "
    "message, and each sees what comes before in its own branch.</desc>",
]

if __name__ == "__main__":
    PICTURE.write_text(drawing(*made()[1]), encoding="utf-8")
