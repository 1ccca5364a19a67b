"""The items of a JSON array one by one, with the standard library and little memory.

ijson names every value by its path, which takes memory by the square of the depth, and so gigabytes
for a hundred kilobytes of "[".
"""

import io
import json
import re
from collections.abc import Iterator
from typing import Any

_BUFFER = 1 << 20


def array_items(text: io.TextIOBase) -> Iterator[tuple[Any, str]]:
    """Streams (item, its own text).

    Raises JSONDecodeError, UnicodeDecodeError or RecursionError where the text is not one array.
    """
    array = _Array(text)
    array.expect("[")
    if array.peek() != "]":
        yield array.item()
    while array.peek() != "]":
        array.expect(",")
        yield array.item()
    array.expect("]")
    array.expect("")


class _Array:
    """The text of an array. A little more than one item is held at a time."""

    _decoder = json.JSONDecoder()
    _blanks = re.compile(r"[ \t\n\r]*")
    _longest_word = len("-Infinity")

    def __init__(self, text: io.TextIOBase):
        self._text, self._buffer, self._at, self._more = text, "", 0, True

    def _fill(self) -> None:
        grown = self._text.read(max(_BUFFER, len(self._buffer) - self._at))
        self._buffer, self._at, self._more = self._buffer[self._at :] + grown, 0, bool(grown)

    def peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            blanks = self._blanks.match(self._buffer, self._at)
            self._at = blanks.end() if blanks else self._at
            if self._at < len(self._buffer) or not self._more:
                return self._buffer[self._at : self._at + 1]
            self._fill()

    def expect(self, mark: str) -> None:
        """Read `mark`; "" stands for the end."""
        if self.peek() != mark:
            what = repr(mark) if mark else "nothing more"
            raise json.JSONDecodeError(f"Expecting {what}", self._buffer, self._at)
        self._at += len(mark)

    def item(self) -> tuple[Any, str]:
        """The next item and its text."""
        while True:
            self.peek()
            try:
                item, end = self._decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                near_end = error.pos >= len(self._buffer) - self._longest_word
                if not self._more or not (near_end or error.msg.startswith("Unterminated")):
                    raise
            else:
                if end < len(self._buffer) or not self._more:  # a number may go on
                    source, self._at = self._buffer[self._at : end], end
                    return item, source
            self._fill()
