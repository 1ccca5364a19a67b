"""Digests of a Hugging Face folder's files, by which a resumed run knows that they are the same."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .huggingface import ASSETS

WHOLE = 64 * 2**20
"""Bytes; of a larger file of weights, samples are read."""
SAMPLE = 4096
"""Bytes at the beginning, in the middle and at the end of each of its tensors."""


def fingerprints(folder: str) -> dict[str, str]:
    """SHA-256 by file: configuration, tokenizer and chat template in full, and the weights.

    Of a file of weights larger than 64 MiB its size, its header (names, shapes, dtypes, places) and
    three samples of each tensor count. Another training, merge, cast or quantization changes those;
    an edit of some rows within a large matrix may not.
    """
    path = Path(folder)
    found = {name: _sha256(path / name) for name in ASSETS if (path / name).is_file()}
    return found | {file.name: _of_weights(file) for file in sorted(path.glob("*.safetensors"))}


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _of_weights(file: Path) -> str:
    size = file.stat().st_size
    if size <= WHOLE:
        return _sha256(file)
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with file.open("rb") as opened:
        for piece in _samples(opened):
            digest.update(piece)
    return digest.hexdigest()


def _samples(file: BinaryIO) -> Iterator[bytes]:
    length = file.read(8)
    header = file.read(int.from_bytes(length, "little"))
    yield length + header
    begin = file.tell()
    tensors = (t["data_offsets"] for name, t in json.loads(header).items() if name[:2] != "__")
    for start, end in sorted(tensors):
        for at in (start, (start + end) // 2, end - SAMPLE):
            file.seek(begin + max(start, at))
            yield file.read(min(SAMPLE, end - start))
