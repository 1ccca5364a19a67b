"""Decisions that need all rows: duplicates, caps per user, where to stop, unique ids.

The workers' tables are memory-mapped; some 300 bytes per row are held, most of them its sketch.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..arrow import pc
from ..filters.duplicates import SKETCH, earlier_equal, earlier_similar
from ..filters.guardrails import GuardrailConfig
from .process import KEPT, Shard, key, whole_table
from .rules import Drop, ExtractionRules

DECISIONS = (KEPT, *Drop)
_CODE = {decision: code for code, decision in enumerate(DECISIONS)}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What became of the R rows of all shards, by their position in `whole_table`."""

    decisions: np.ndarray
    """(R,) index into `DECISIONS`."""
    places: np.ndarray
    """(R,) in the order of `plan.order_of`."""
    kept: np.ndarray
    """Positions of the kept rows, in that order."""
    duplicate_of: np.ndarray
    """(R,) position of the earlier row that it repeats, or -1."""
    counts: np.ndarray
    """(R,) interactions that each row gave."""
    renamed: dict[tuple[int, int], int]
    """(position, which of its interactions) -> n, where its id becomes "id~n"."""
    examined: np.ndarray
    """(R,) bool: the rules had not stopped before the row."""
    stopped: bool
    """The rules said that it is enough."""


def merge(
    shards: list[Shard],
    order: np.ndarray | None,
    rules: ExtractionRules,
    guardrails: GuardrailConfig,
) -> Choice:
    """Decides on all rows.

    Args:
        order: place of every row of the log; None: as they come.
    """
    table = whole_table(shards)
    index = _numbers(table, "index")
    places = index if order is None else order[index]
    decisions = pc.index_in(table["decision"], pa.array(DECISIONS)).to_numpy().astype(np.int8)
    kept = np.flatnonzero(decisions == _CODE[KEPT])
    kept = kept[np.argsort(places[kept], kind="stable")]
    duplicate_of = np.full(len(index), -1)

    counts = pc.fill_null(pc.list_value_length(table["interaction_ids"]), 0).to_numpy()

    def drop(reason: Drop, of: np.ndarray, earlier: np.ndarray) -> None:
        nonlocal kept
        lost = of[earlier >= 0]
        decisions[lost] = _CODE[reason]
        duplicate_of[lost] = of[earlier[earlier >= 0]]
        kept = kept[decisions[kept] == _CODE[KEPT]]

    if guardrails.max_per_user:
        over = _nth(_numbers(table, "user_key")[kept]) > guardrails.max_per_user
        decisions[kept[over]] = _CODE[Drop.USER_CAP]
        kept = kept[~over]
    # what gives no interaction is no reason to drop another that does
    if guardrails.duplicates != "off":
        names = ("fingerprint_high", "fingerprint_low")
        of = kept[counts[kept] > 0]
        prints = np.stack([_numbers(table, name)[of] for name in names], axis=1)
        drop(Drop.DUPLICATE, of, earlier_equal(prints))
    if guardrails.duplicates == "near":
        of = kept[counts[kept] > 0]
        drop(Drop.NEAR_DUPLICATE, of, _similar(table, of, guardrails.similarity))

    is_log = ~pc.fill_null(table["ready"], False).to_numpy()[kept]
    end = _enough(np.cumsum(is_log), np.cumsum(counts[kept] * is_log), rules)
    stopped = end is not None
    examined = places <= places[kept[end]] if end is not None else np.ones(len(index), bool)
    kept = kept if end is None else kept[: end + 1]
    return Choice(
        decisions=decisions,
        places=places,
        kept=kept,
        duplicate_of=duplicate_of,
        counts=counts,
        renamed=_renamed(table, kept, counts),
        examined=examined,
        stopped=stopped,
    )


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    return pc.fill_null(table[name], 0).to_numpy()


def _similar(table: pa.Table, kept: np.ndarray, similarity: float) -> np.ndarray:
    """`earlier_similar` of the rows that have a sketch; -1 for the others."""
    column = table["sketch"]
    has_sketch = column.is_valid().to_numpy()
    sketched = np.flatnonzero(has_sketch[kept])
    target = np.full(len(has_sketch), -1)
    target[kept[sketched]] = np.arange(len(sketched))
    sketches = np.empty((len(sketched), SKETCH), np.uint32)
    start = 0
    for chunk in column.chunks:
        of_chunk = target[start : start + len(chunk)][has_sketch[start : start + len(chunk)]]
        rows = chunk.flatten().to_numpy().reshape(-1, SKETCH)
        sketches[of_chunk[of_chunk >= 0]] = rows[of_chunk >= 0]
        start += len(chunk)
    earlier = np.full(len(kept), -1)
    found = earlier_similar(sketches, similarity)
    earlier[sketched] = np.where(found >= 0, sketched[found], -1)
    return earlier


def _nth(keys: np.ndarray) -> np.ndarray:
    """Each key's number among its equals, from 1; 0 for key 0, which stands for none."""
    by_key = np.argsort(keys, kind="stable")
    is_first = np.diff(keys[by_key], prepend=keys[by_key][:1] + np.uint64(1)) != 0
    starts = np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))
    nth = np.empty(len(keys), np.int64)
    nth[by_key] = np.arange(len(keys)) - starts + 1
    return np.where(keys == 0, 0, nth)


def _enough(
    conversations: np.ndarray, interactions: np.ndarray, rules: ExtractionRules
) -> int | None:
    """Index of the row after which the rules stop; None: never."""
    enough = np.zeros(len(conversations), bool)
    if rules.max_conversations is not None:
        enough |= conversations >= rules.max_conversations
    if rules.enough_interactions is not None:
        late = conversations >= max(1, rules.enough_after_conversations)
        enough |= late & (interactions >= rules.enough_interactions)
    return int(np.argmax(enough)) if enough.any() else None


def _renamed(table: pa.Table, kept: np.ndarray, counts: np.ndarray) -> dict[tuple[int, int], int]:
    """Numbers for repeated ids: public logs do repeat conversation ids."""
    column = table["id_keys"].take(pa.array(kept))
    keys = pc.list_flatten(column).to_numpy()
    nth = _nth(keys)
    repeated = np.flatnonzero(nth > 1)
    if not len(repeated):
        return {}
    given, new = np.sort(keys), set[int]()
    ends = np.cumsum(counts[kept])
    renamed = {}
    for i in repeated.tolist():
        row = int(np.searchsorted(ends, i, side="right"))
        position, which = int(kept[row]), int(i - (ends[row] - counts[kept[row]]))
        id = table["interaction_ids"][position][which].as_py()
        n = int(nth[i])
        while (marked := key(f"{id}~{n}")) in new or _is_in(given, marked):
            n += 1
        new.add(marked)
        renamed[position, which] = n
    return renamed


def _is_in(ordered: np.ndarray, value: int) -> bool:
    at = np.searchsorted(ordered, np.uint64(value))
    return bool(at < len(ordered) and ordered[at] == np.uint64(value))
