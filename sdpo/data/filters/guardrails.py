"""Which filters protect the users, the model and the run; what each looks for, its module says.

A paper's preset gives the published rows, so its guardrails are off unless asked for; elsewhere
they are on. One that needs a column which a log lacks says so in the report.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from ...errors import DataError, SdpoError


@dataclass(frozen=True, kw_only=True)
class GuardrailConfig:
    """None: as the preset says."""

    flagged: bool | None = None
    """Drop conversations that moderation flagged, or called toxic, in any message."""
    redacted: bool | None = None
    """Drop conversations that their publisher redacted."""
    pii: Literal["off", "regex", "presidio"] | None = None
    """Replace e-mails, phone numbers, cards, addresses and keys by typed placeholders; presidio
    adds names and places, and needs the ``presidio`` extra."""
    duplicates: Literal["off", "exact", "near"] | None = None
    """Keep the first of equal conversations; near: of similar ones, too."""
    similarity: float = 0.8
    """Jaccard similarity of shingles from which conversations count as near-duplicates."""
    injections: bool | None = None
    """Drop follow-ups that try to close or imitate the hindsight note."""
    max_per_user: int | None = None
    """Conversations of one user that are kept, the first ones; 0 keeps all. On: 1,000."""
    opt_out: str | None = None
    """File of conversation ids, user ids and hashed addresses, one a line, to be left out."""

    def __post_init__(self) -> None:
        if not 0 < self.similarity <= 1:
            raise SdpoError(f"guardrails.similarity is {self.similarity}; use one in (0, 1]")
        if self.max_per_user is not None and self.max_per_user < 0:
            raise SdpoError(f"guardrails.max_per_user is {self.max_per_user}; use 0 for no cap")


ON = GuardrailConfig(
    flagged=True, redacted=True, pii="regex", duplicates="near", injections=True, max_per_user=1000
)
OFF = GuardrailConfig(
    flagged=False, redacted=False, pii="off", duplicates="off", injections=False, max_per_user=0
)


def resolve(config: GuardrailConfig, preset: str) -> GuardrailConfig:
    """Every None replaced by what the preset says."""
    default = OFF if preset.startswith("paper-") else ON
    asked = {f.name: getattr(config, f.name) for f in fields(config)}
    return replace(default, **{name: value for name, value in asked.items() if value is not None})


def states(config: GuardrailConfig, knows: frozenset[str]) -> dict[str, str]:
    """Of every guardrail: on, off, or that the logs do not have its column."""
    on = {
        "moderation flags": config.flagged,
        "redacted rows": config.redacted,
        "personal data": config.pii != "off",
        "duplicates": config.duplicates != "off",
        "near-duplicates": config.duplicates == "near",
        "prompt injections": config.injections,
        "cap per user": bool(config.max_per_user),
        "opt-out": bool(config.opt_out),
    }
    columns = {"moderation flags": "flagged", "redacted rows": "redacted", "cap per user": "user"}
    return {
        name: "off"
        if not is_on
        else "on"
        if columns.get(name, "") in {"", *knows}
        else "no such column"
        for name, is_on in on.items()
    }


def read_opt_out(path: str) -> frozenset[str]:
    """The ids of an opt-out file; lines that begin with # are comments."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        problem = f"the opt-out list cannot be read ({reason})"
        raise DataError(problem, file=path, hint="Check it") from None
    ids = (line.strip() for line in text.splitlines())
    return frozenset(id for id in ids if id and not id.startswith("#"))
