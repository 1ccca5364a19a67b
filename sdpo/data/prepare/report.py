"""The report of a preparation: settings and counts."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..arrow import pc
from ..filters.guardrails import states
from .config import PrepareConfig
from .merge import DECISIONS, Choice
from .plan import FilePlan
from .process import Job, Shard, whole_table
from .rules import ExtractionRules, Unused

VERSION = 2
"""Version of the report's fields."""
_SHOWN = 20
"""Bad rows that the report names."""
_NAMED = 100
"""Kinds of what was left out that the report names, the most frequent ones."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was read, dropped and kept. rows = conversations_examined + those after the stop;
    conversations_examined = conversations_kept + the drops (but unreadable files).

    `interaction_drops` counts answers of the kept conversations by why they became no interaction;
    but under the paper's presets, it and `interactions` are all answers of these. `left_out` counts
    messages, or what of messages, that no prompt holds, of all conversations whose messages were
    looked at: "unknown role NAME", "part image_url", "blank message", "tool result", "reasoning"...
    """

    out: str
    sha256: str
    preset: str
    rules: dict[str, Any]
    guardrails: dict[str, Any]
    inputs: list[dict[str, Any]]
    counts: dict[str, int]
    drops: dict[str, int]
    interaction_drops: dict[str, int]
    left_out: dict[str, int]
    pii: dict[str, int]
    guards: dict[str, str]
    bad_rows: list[str]
    version: int = VERSION


def make_report(
    config: PrepareConfig,
    job: Job,
    plans: list[FilePlan],
    shards: list[Shard],
    choice: Choice,
    digest: str,
) -> Report:
    """Counts what became of everything; `digest` is the interactions' sha256."""
    examined = Counter(choice.decisions[choice.examined].tolist())
    drops = {DECISIONS[code]: n for code, n in sorted(examined.items()) if code}
    if unread := [plan.error for plan in plans if plan.error]:
        drops["unreadable file"] = len(unread)
    table = whole_table(shards)
    summed = ["ready", "injections", "opted_out"]
    kept = table.select([*summed, "pii", "unused"]).take(pa.array(choice.kept))
    sums = {name: pc.sum(kept[name]).as_py() or 0 for name in summed}
    examined_rows = pa.array(choice.examined)
    errors = table["error"].filter(examined_rows).drop_null()[:_SHOWN].to_pylist()
    gone = {"opted out": sums["opted_out"], "prompt injection": sums["injections"]}
    unused = _summed(kept["unused"])
    gone |= {why: unused[why] for why in Unused if why in unused}
    knows = frozenset[str]().union(*(plan.log.knows for plan in plans if plan.log))
    return Report(
        out=Path(config.out).name,  # without the folder: the files may move together
        sha256=digest,
        preset=config.preset,
        rules=_rules(job.rules),
        guardrails=_plain(job.guardrails),
        inputs=[_input(plan) for plan in plans],
        counts={
            "rows": sum(plan.rows for plan in plans),
            "conversations_examined": int(choice.examined.sum()),
            "conversations_kept": len(choice.kept),
            "interactions": int(choice.counts[choice.kept].sum()),
            "ready_interactions": sums["ready"],
            "renamed_ids": len(choice.renamed),
        },
        drops=drops,
        interaction_drops={reason: n for reason, n in gone.items() if n},
        left_out=most(_summed(table["left_out"].filter(examined_rows)), _NAMED),
        pii=dict(sorted(_summed(kept["pii"]).items())),
        guards=states(job.guardrails, knows),
        bad_rows=[*unread, *errors][:_SHOWN],
    )


def _summed(maps: pa.ChunkedArray) -> dict[str, int]:
    """The sum of many maps of names to numbers."""
    parts = [
        pa.table({"name": entries.field("key"), "n": entries.field("value")})
        for chunk in maps.chunks
        if len(entries := chunk.drop_null().cast(_ENTRIES).flatten())
    ]
    if not parts:
        return {}
    sums = pa.concat_tables(parts).group_by("name").aggregate([("n", "sum")])
    return dict(zip(sums["name"].to_pylist(), sums["n_sum"].to_pylist(), strict=True))


_ENTRIES = pa.list_(pa.struct({"key": pa.string(), "value": pa.int32()}))


def most(counts: Mapping[str, int], n: int = 12) -> dict[str, int]:
    """The n most frequent ones, and the sum of the rest: names in a log may be endless."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = ordered[n:]
    more = {f"{len(rest):,} kinds more": sum(n for _, n in rest)} if rest else {}
    return dict(ordered[:n]) | more


def _rules(rules: ExtractionRules) -> dict[str, Any]:
    """What is off and came later is not there: reports of older settings keep their bytes."""
    plain = _plain(rules)
    if not rules.next_response:
        del plain["next_response"]
    return plain


def _plain(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config)))


def _input(plan: FilePlan) -> dict[str, Any]:
    return {
        "path": str(plan.path),
        "format": plan.log.format if plan.log else None,
        "container": plan.log.file.container if plan.log else None,
        "bytes": plan.size,
        "rows": plan.rows,
    }
