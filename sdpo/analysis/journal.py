"""Results of a long command as they come, in a file beside its output: a killed one goes on there.

``OUT.partial`` holds lines of JSON. The first is the header, which says what decides the results;
then comes one row per interaction, in the order of the interactions. A kill leaves at most half a
line at the end. When the output is written the file has served its purpose.
"""

import fcntl
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .. import __version__
from ..errors import SdpoError

SHOWN = 40
"""Characters of a value that an error shows."""


class Journal:
    """Rows that are kept until the output is written. It is a context, within which it is open.

    Args:
        out: the command's output; None: rows are kept as long as the process lives.
    """

    def __init__(self, out: str | None):
        self.path = None if out is None else Path(f"{out}.partial")
        self.count = 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc: object) -> None:
        if self.count == 0:  # it ended before it began
            self.discard()
        if self._file is not None:
            self._file.close()

    def open(self, header: Mapping[str, Any], *, keeps: Sequence[str] = ()) -> dict[str, Any]:
        """Go on where rows with this header end, or begin.

        Args:
            header: what decides the results, by name, as JSON values.
            keeps: names whose value is that of the rows which are there.

        Returns:
            The header that holds.

        Raises:
            SdpoError: the rows there have another header; names what differs. Or another process
                is writing them, or they are no rows of this program.
        """
        now: dict[str, Any] = json.loads(json.dumps({"sdpo": __version__, **header}))
        file = self._locked()
        try:
            sizes = [len(line) for line in file if line.endswith(b"\n")]
            then = self._header(file) if sizes else {}
            if len(sizes) > 1:
                now |= {name: then[name] for name in keeps if name in then}
                self._refuse_others(then, now)
        except SdpoError:
            file.close()
            raise
        self._file, self.count = file, max(0, len(sizes) - 1)
        file.truncate(sum(sizes) if self.count else 0)  # half a line, or a header alone
        if not self.count:
            self._write([now])
        return now

    def append(self, rows: Iterable[Any]) -> None:
        """Add rows; when it returns they are on disk.

        Raises:
            SdpoError: they cannot be written.
        """
        self.count += self._write(rows)

    def rows(self) -> Iterator[Any]:
        """All of them, from the first."""
        assert self._file is not None
        self._file.seek(0)
        next(self._file)  # the header
        yield from map(json.loads, self._file)

    def discard(self) -> None:
        """Remove the file."""
        if self.path is not None and self._file is not None:
            self.path.unlink(missing_ok=True)

    def _locked(self) -> BinaryIO:
        if self.path is None:
            return tempfile.TemporaryFile("a+b")  # pyright: ignore[reportReturnType]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+b")
        except OSError as error:
            raise self._unwritten(error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise SdpoError(
                f"{self.path}: another process is writing it; wait for it, stop it, or use another "
                "output"
            ) from None
        except OSError:  # a file system without locks
            pass
        file.seek(0)
        return file

    def _header(self, file: BinaryIO) -> dict[str, Any]:
        file.seek(0)
        try:
            header = json.loads(next(file))
        except ValueError:
            header = None
        if not isinstance(header, dict) or "sdpo" not in header:
            raise SdpoError(
                f"{self.path} holds no results of a killed run: move it away, or use another output"
            )
        return header

    def _refuse_others(self, then: dict[str, Any], now: dict[str, Any]) -> None:
        changed = [
            f"{name} ({_short(then.get(name))} then, {_short(now.get(name))} now)"
            for name in sorted(then.keys() | now.keys())
            if then.get(name) != now.get(name)
        ]
        if changed:
            raise SdpoError(
                f"{self.path} holds results of a run that was stopped, and differs from this one "
                f"in {', '.join(changed)}: put back what was there to go on with it, delete the "
                "file to begin again, or use another output"
            )

    def _write(self, rows: Iterable[Any]) -> int:
        assert self._file is not None
        lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
        try:
            self._file.write(b"".join(lines))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritten(error) from error
        return len(lines)

    def _unwritten(self, error: OSError) -> SdpoError:
        return SdpoError(
            f"{self.path or tempfile.gettempdir()} could not be written ({error.strerror}): see to "
            "that, then start the same command again; it goes on where it was"
        )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
