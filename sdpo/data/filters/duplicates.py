"""Exact and near duplicates among conversations, by fingerprint and by MinHash.

A text is the messages of a conversation, joined by newlines. Exact duplicates are equal up to case
and white space. Near duplicates share most of their shingles: three words in a row, words being
letters and digits without case or punctuation. Chinese, Japanese, Thai, Lao, Khmer and Burmese put
no spaces between words: there, every character is a word.

rensa hashes words and makes the sketches. Its index is not used: it marks every row of a group,
the first included, does not verify, and takes several times the memory. Sorting bands in numpy
names the row that came first.
"""

import hashlib
import re
from collections.abc import Sequence
from itertools import chain

import numpy as np
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]

from ...errors import SdpoError

SKETCH = 64
"""Hashes of a sketch: a similarity s is estimated with a deviation of sqrt(s (1 - s) / 64)."""

SHINGLE = 3
"""Words of a shingle."""

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
)
_WORD = re.compile(r"\w+")
_CHARACTER = re.compile(f"[{_UNSPACED}]")
_WORD_OR_CHARACTER = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_ASCII_WORDS = "".join(c if _WORD.match(c) else " " for c in map(chr, range(128)))
_TEXTS_AT_ONCE = 32  # their hashes stay in the cache
_PAIRS_AT_ONCE = 1 << 14
# what a word's hash is multiplied by at each place of a shingle: odd, so that nothing is lost
_PLACES = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)


def fingerprints(texts: Sequence[str]) -> np.ndarray:
    """uint64 (N, 2): equal where the texts are, up to case and white space (BLAKE2b, 128 bits)."""
    digests = (
        hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=16).digest()
        for text in texts
    )
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)


def sketches(texts: Sequence[str]) -> np.ndarray:
    """uint32 (N, SKETCH): two rows agree in a share of places that estimates the similarity.

    The similarity of two texts is the Jaccard index of their sets of shingles. The same texts give
    the same sketches in every process, as long as rensa's `ALGORITHM_VERSION` stays.
    """
    out = np.empty((len(texts), SKETCH), np.uint32)
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        batch = texts[start : start + _TEXTS_AT_ONCE]
        hashes, offsets = _shingles([split_words(text) for text in batch])
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, SKETCH, 0)
        out[start : start + len(batch)] = matrix.to_rows()
    return out


def split_words(text: str) -> list[str]:
    """A text's words: casefolded, and filled up with "" to the length of one shingle."""
    text = text.casefold()
    if text.isascii():
        words = text.translate(_ASCII_WORDS).split()  # finds what _WORD does, much faster
    else:
        words = (_WORD_OR_CHARACTER if _CHARACTER.search(text) else _WORD).findall(text)
    words = words or text.split()
    return words + [""] * (SHINGLE - len(words))


def _shingles(words: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """uint64 hashes of all texts' shingles, and uint64 (N + 1,) where each text's begin and end."""
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    hashes = np.fromiter(
        chain.from_iterable(RMinHash.hash_token_sets(words)), np.uint64, int(lengths.sum())
    )
    ends = np.cumsum(lengths)
    whole = np.ones(len(hashes), bool)
    for place in range(1, SHINGLE):
        whole[ends - place] = False  # these would run into the next text
    padded = np.concatenate([hashes, np.zeros(SHINGLE - 1, np.uint64)])
    mixed = sum(padded[i : i + len(hashes)] * _PLACES[i] for i in range(SHINGLE))
    offsets = np.concatenate([[0], ends - (SHINGLE - 1) * np.arange(1, len(ends) + 1)])
    return np.ascontiguousarray(mixed[whole]), offsets.astype(np.uint64)  # pyright: ignore


def earlier_equal(fingerprints: np.ndarray) -> np.ndarray:
    """int64 (N,): the first row before this one with the same fingerprint, -1 where there is none.

    Args:
        fingerprints: uint64 (N, 2), rows in the order in which the first is to be kept.
    """
    order = np.lexsort(fingerprints.T)
    first, _ = _buckets(fingerprints[order], order)
    return np.where(first < np.arange(len(first)), first, -1)


def earlier_similar(sketches: np.ndarray, threshold: float = 0.8) -> np.ndarray:
    """int64 (N,): an earlier row that this one is a near duplicate of, -1 where there is none.

    Rows that agree in a whole band of the sketch are candidates: each is compared with the first of
    them and with the one right before it. A row is a duplicate only of one that is none itself, so
    a chain of small changes is cut where it has drifted away from its beginning. Beside the
    sketches, this holds the temporaries of one band and the similar pairs.

    Args:
        sketches: uint32 (N, SKETCH), rows in the order in which the first is to be kept.
        threshold: estimated similarity, 0 < threshold <= 1.

    Raises:
        SdpoError: the threshold is out of range.
    """
    if not 0 < threshold <= 1:
        raise SdpoError(f"threshold is a similarity above 0 and at most 1, got {threshold}")
    count = len(sketches)
    pairs = np.empty(0, np.int64)
    width = _band_width(threshold)
    for start in range(0, SKETCH, width):
        found = _similar_in_band(sketches, slice(start, start + width), threshold)
        pairs = np.union1d(pairs, found)
    later, earlier = np.divmod(pairs, max(count, 1))
    return _resolve(sketches, later, earlier, threshold)


def _band_width(threshold: float) -> int:
    """The widest band that a pair at the threshold agrees in at least one of, 99 times in 100."""
    widths = (SKETCH // 2**i for i in range(SKETCH.bit_length()))
    return next(w for w in widths if (1 - threshold**w) ** (SKETCH // w) < 0.01 or w == 1)


def _similar_in_band(sketches: np.ndarray, band: slice, threshold: float) -> np.ndarray:
    """`later row * N + earlier row` of the similar pairs that one band shows, each once."""
    first, before = _buckets(*_sorted_band(sketches[:, band]))
    pairs = []
    for start in range(0, len(sketches), _PAIRS_AT_ONCE):
        rows = np.arange(start, min(start + _PAIRS_AT_ONCE, len(sketches)))
        for candidates, known in ((first[rows], rows), (before[rows], first[rows])):
            some = candidates != known
            later, earlier = rows[some], candidates[some]
            similar = _similarity(sketches[later], sketches[earlier]) >= threshold
            pairs.append(later[similar] * len(sketches) + earlier[similar])
    return np.concatenate(pairs) if pairs else np.empty(0, np.int64)


def _sorted_band(band: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted keys, equal where the rows of a band are (else by rare chance), and the rows' order.

    The row's number fills a key's low bits: one plain sort, several times faster than a stable
    argsort, keeps rows of one key in order.
    """
    keys = np.zeros(len(band), np.uint64)
    for column in band.T:
        keys ^= column
        keys *= _PLACES[0]
        keys ^= keys >> np.uint64(29)
    bits = np.uint64(len(band).bit_length())
    keys <<= bits
    keys |= np.arange(len(band), dtype=np.uint64)
    keys.sort()
    order = (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
    keys >>= bits
    return keys, order


def _buckets(keys: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row, the first row with its key and the one right before it (or the row itself).

    `keys`, (N,) or (N, k), are sorted; `order` is the stable order that sorted them.
    """
    new = np.ones(len(keys), bool)
    changed = keys[1:] != keys[:-1]
    new[1:] = changed.any(axis=1) if keys.ndim == 2 else changed
    starts = np.flatnonzero(new)
    first, before = np.empty_like(order), np.empty_like(order)
    first[order] = np.repeat(order[starts], np.diff(starts, append=len(keys)))
    before[order] = np.where(new, order, np.roll(order, 1))
    return first, before


def _similarity(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.count_nonzero(some == others, axis=-1) / SKETCH


def _resolve(
    sketches: np.ndarray, later: np.ndarray, earlier: np.ndarray, threshold: float
) -> np.ndarray:
    """Goes through similar pairs, sorted by the later row; no row may duplicate a duplicate.

    A candidate that is one stands for what it duplicates, if that is similar too.
    """
    duplicate_of = np.full(len(sketches), -1, np.int64)
    for row, candidate in zip(later.tolist(), earlier.tolist(), strict=True):
        if duplicate_of[row] < 0:
            root = duplicate_of[candidate]
            if root < 0:
                duplicate_of[row] = candidate
            elif _similarity(sketches[row], sketches[root]) >= threshold:
                duplicate_of[row] = root
    return duplicate_of
