"""Style markers of answers whose marks can be counted by eye."""

import pytest

from sdpo.errors import SdpoError
from sdpo.evaluate.style import Marks, Style, add_style, comparison

FORMATTED = """# Penguins 🐧

- **where**: Antarctica
- **what**: fish
- swim

| a | b |
|---|---|
| 1 | 2 |

```
- code is no list, **nor bold**
```"""
CHATTY = "Great question! Penguins eat fish. Let me know if you need more."
LEAK = "I apologize for the long answer. Penguins eat fish."
PLAIN = "Penguins eat fish."


def test_each_marker_is_counted():
    style = Style.of([FORMATTED, CHATTY, LEAK, PLAIN], [True, None, False, True])
    assert style.answers == 4
    assert style.characters == sum(map(len, (FORMATTED, CHATTY, LEAK, PLAIN))) / 4
    assert style.list_items == Marks(mean=3 / 4, share=1 / 4)
    assert style.headers == Marks(mean=1 / 4, share=1 / 4)
    assert style.bold == Marks(mean=2 / 4, share=1 / 4)
    assert style.table_rows == Marks(mean=2 / 4, share=1 / 4)
    assert style.emojis == Marks(mean=1 / 4, share=1 / 4)
    assert (style.praise, style.offers, style.leaks, style.blank) == (1 / 4, 1 / 4, 1 / 4, 0)
    assert style.finished == 2 / 3


def test_words_are_not_characters():
    assert Style.of([PLAIN]).words == 3


def test_a_blank_answer_praises_nothing_and_offers_nothing():
    style = Style.of(["", PLAIN])
    assert (style.praise, style.offers, style.leaks, style.blank) == (0, 0, 0, 1 / 2)


def test_what_is_known_of_no_answer_is_unknown():
    assert Style.of([PLAIN], [None]).finished is None
    assert Style.of([PLAIN]).finished is None


def test_no_answers_have_no_style():
    with pytest.raises(SdpoError, match="at least one"):
        Style.of([])


def test_every_marker_is_shown_for_each_set():
    table = comparison("title", ["ours", "theirs"])
    add_style(table, [Style.of([FORMATTED], [True]), Style.of([PLAIN])])
    names, ours, theirs = (list(column.cells) for column in table.columns)
    shown = dict(zip(names, zip(ours, theirs, strict=True), strict=True))
    assert shown["list items"] == ("3.00 (100%)", "0.00 (0%)")
    assert shown["finished"] == ("100.0%", "unknown")
    assert shown["words"] == ("16", "3")
    assert len(shown) == len(Style.__dataclass_fields__)
