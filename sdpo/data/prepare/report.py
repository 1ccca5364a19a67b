"""The report of a preparation: settings and counts."""

import json
from collections import Counter
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

VERSION = 1
"""Version of the report's fields."""
_SHOWN = 20
"""Bad rows that the report names."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was read, dropped and kept. rows = conversations_examined + those after the stop;
    conversations_examined = conversations_kept + the drops (but unreadable files)."""

    out: str
    sha256: str
    preset: str
    rules: dict[str, Any]
    guardrails: dict[str, Any]
    inputs: list[dict[str, Any]]
    counts: dict[str, int]
    drops: dict[str, int]
    interaction_drops: dict[str, int]
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
    summed = ["ready", "without_history", "blank", "injections", "opted_out"]
    kept = table.select([*summed, "pii"]).take(pa.array(choice.kept))
    sums = {name: pc.sum(kept[name]).as_py() or 0 for name in summed}
    replaced: Counter[str] = Counter()
    for counts in kept["pii"].drop_null().to_pylist():
        replaced.update(dict(counts))
    errors = table["error"].filter(pa.array(choice.examined)).drop_null()[:_SHOWN].to_pylist()
    gone = {
        "opted out": sums["opted_out"],
        "prompt injection": sums["injections"],
        "blank answer or follow-up": sums["blank"],
    }
    knows = frozenset[str]().union(*(plan.log.knows for plan in plans if plan.log))
    return Report(
        out=Path(config.out).name,  # without the folder: the files may move together
        sha256=digest,
        preset=config.preset,
        rules=_plain(job.rules),
        guardrails=_plain(job.guardrails),
        inputs=[_input(plan) for plan in plans],
        counts={
            "rows": sum(plan.rows for plan in plans),
            "conversations_examined": int(choice.examined.sum()),
            "conversations_kept": len(choice.kept),
            "interactions": int(choice.counts[choice.kept].sum()),
            "answers_without_history": sums["without_history"],
            "ready_interactions": sums["ready"],
            "renamed_ids": len(choice.renamed),
        },
        drops=drops,
        interaction_drops={reason: n for reason, n in gone.items() if n},
        pii=dict(sorted(replaced.items())),
        guards=states(job.guardrails, knows),
        bad_rows=[*unread, *errors][:_SHOWN],
    )


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
