"""Token sequences laid out so that each shared prefix is there once.

In sorted order a sequence begins with what it shares with the one before it: its own slots are the
rest. That is a trie laid out depth first, without a node.

Shapes: T slots of a layout.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
ROOT = -1
"""The slot before all others, for branches that begin with nothing."""


@dataclass(frozen=True)
class Layout:
    """Slots of sequences that share their prefixes, depth first."""

    tokens_T: NDArray[np.int64]
    depth_T: NDArray[np.int64]
    """A slot's place in its sequence, from 0."""
    place_T: NDArray[np.int64]
    """The slot's number; in a `join`, among the slots of both layouts."""
    end_T: NDArray[np.int64]
    """The place after the last that descends from this one."""
    paths: list[NDArray[np.int64]]
    """Slots of each sequence, or of what is new in it, in the order given."""

    @property
    def slots(self) -> int:
        """T."""
        return len(self.tokens_T)


def lay_out(sequences: Sequence[Ids], stems: Sequence[int] | None = None) -> Layout:
    """A layout of sequences, none of them empty.

    Args:
        stems: what a sequence hangs from; those on different stems share nothing.
    """
    stems = [ROOT] * len(sequences) if stems is None else stems
    order = sorted(range(len(sequences)), key=lambda i: (stems[i], _sort_key(sequences[i])))
    tokens, depth, paths = [], [], [np.empty(0, np.int64)] * len(sequences)
    end_T = np.zeros(sum(map(len, sequences)), np.int64)
    total, before = 0, None
    for i in order:
        ids, shared = sequences[i], 0
        if before is not None:
            shared = common(sequences[before], ids) if stems[before] == stems[i] else 0
            end_T[paths[before][shared:]] = total
        paths[i] = np.arange(total - shared, total - shared + len(ids))
        if before is not None:
            paths[i][:shared] = paths[before][:shared]
        tokens.append(ids[shared:])
        depth.append(np.arange(shared, len(ids)))
        total, before = total + len(ids) - shared, i
    if before is not None:
        end_T[paths[before]] = total
    empty = np.empty(0, np.int64)
    tokens_T, depth_T = (np.concatenate([empty, *parts]) for parts in (tokens, depth))
    return Layout(tokens_T, depth_T, np.arange(total), end_T[:total], paths)


def common(a: Ids, b: Ids) -> int:
    """How many ids two sequences begin with alike."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


class Prefixes:
    """Finds the longest prefix of a sequence in a layout.

    Args:
        sequences: as they were laid out.
    """

    def __init__(self, sequences: Sequence[Ids], layout: Layout):
        self._sequences, self._paths = sequences, layout.paths
        self._order = sorted(range(len(sequences)), key=lambda i: _sort_key(sequences[i]))
        self._keys = [_sort_key(sequences[i]) for i in self._order]

    def longest(self, ids: Ids, most: int) -> tuple[int, int]:
        """How long it is, at most ``most``, and its last slot (ROOT where there is none)."""
        at = bisect_left(self._keys, _sort_key(ids))
        # in sorted order, the neighbours have the longest prefixes in common
        lengths = {i: common(self._sequences[i], ids) for i in self._order[max(0, at - 1) : at + 1]}
        if not lengths or not (length := min(most, max(lengths.values()))):
            return 0, ROOT
        nearest = max(lengths, key=lambda i: lengths[i])
        return length, int(self._paths[nearest][length - 1])


def _sort_key(ids: Ids) -> bytes:
    return ids.astype(">u4").tobytes()


def join(first: Sequence[Ids], second: Sequence[Ids], most: Sequence[int]) -> tuple[Layout, Layout]:
    """Lay out ``first``, and what is new in ``second`` as branches that hang from its slots: two
    layouts with places in one common order.

    Args:
        most: how many tokens of each sequence of ``second`` the first may hold; fewer than it has.
    """
    base = lay_out(first)
    prefixes = Prefixes(first, base)
    found = [prefixes.longest(ids, n) for ids, n in zip(second, most, strict=True)]
    rest = [ids[n:] for ids, (n, _) in zip(second, found, strict=True)]
    branches = lay_out(rest, [stem for _, stem in found])
    stem_T, kept_T = np.empty_like(branches.tokens_T), np.empty_like(branches.tokens_T)
    for path, (kept, stem) in zip(branches.paths, found, strict=True):
        kept_T[path], stem_T[path] = kept, stem
    # a branch comes right behind its stem, before the stem's own descendants
    before = np.searchsorted(stem_T, np.arange(base.slots + 1))
    return (
        replace(base, place_T=base.place_T + before[:-1], end_T=base.end_T + before[base.end_T]),
        replace(
            branches,
            depth_T=branches.depth_T + kept_T,
            place_T=branches.place_T + stem_T + 1,
            end_T=branches.end_T + stem_T + 1,
        ),
    )
