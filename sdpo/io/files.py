"""Files that appear whole or not at all, and their hashes."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO


def write_text(path: str | Path, text: str) -> None:
    """Write a whole file or nothing."""
    with written_whole(path) as file:
        file.write(text)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a whole file or nothing."""
    with _renamed(path) as partial, partial.open("wb") as file:
        file.write(data)
        _flush(file)


@contextmanager
def written_whole(path: str | Path) -> Iterator[TextIO]:
    """Opens a text file for writing beside ``path``, and renames it when all is written.

    An error removes it, and leaves ``path`` as it was. Missing folders are created.
    """
    with _renamed(path) as partial, partial.open("w", encoding="utf-8") as file:
        yield file
        _flush(file)


@contextmanager
def _renamed(path: str | Path) -> Iterator[Path]:
    """A name beside ``path``; what was written there is renamed, or after an error removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
