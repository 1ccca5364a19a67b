"""What to prepare: the configuration behind `sdpo data prepare`."""

import re
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import tyro

from ...errors import SdpoError
from ...io.fields import listed
from ..filters.guardrails import GuardrailConfig
from ..read.formats import FORMATS, Format
from .rules import PRESETS, ExtractionRules

Preset = Literal["strict", "paper-wildchat", "paper-wildfeedback", "all-turns"]
assert set(Preset.__args__) == set(PRESETS)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Settings of a preparation."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders, globs and data sets of the Hugging Face hub (owner/name): logs in the formats
    of WildChat, WildFeedback, LMSYS, ShareGPT or OpenAI messages, and ready interactions; parquet
    or JSON."""
    out: str
    """The file to write, .jsonl or .parquet; manifest and report are written beside it."""
    preset: Preset = "strict"
    """Which conversations and turns to keep; see sdpo.data.prepare.rules."""
    format: Format | Literal["auto"] = "auto"
    """Format of all inputs; auto recognises it file by file."""
    languages: tuple[str, ...] | None = None
    """Languages to keep, as the log names them, or "any"; None: as the preset says."""
    shuffle_seed: int | None = None
    """Seed of the order of rows; None: as the preset says."""
    max_conversations: int | None = None
    """Stop after so many kept conversations; None: as the preset says."""
    tools: Literal["drop", "keep"] | None = None
    """What becomes of answers that rest on tool calls or their results: drop leaves them out and
    counts them; keep has calls and results in the prompt. None: drop (not for the paper's presets,
    which pass over tools)."""
    system: Literal["keep", "drop"] | None = None
    """Whether system messages stand first in the prompts. None: keep (not for the paper's presets,
    which have none)."""
    role_map: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What a role means that is not known: name=user, name=assistant, name=system, name=tool (a
    result) or name=call (a tool call as JSON). May be given many times."""
    next_response: bool = False
    """Also keep the answer that came behind each follow-up (next_completion), to train SFT or DPO
    on; interactions without one are left out and counted."""
    guardrails: GuardrailConfig = field(default_factory=GuardrailConfig)
    bad_rows: Literal["stop", "skip"] = "stop"
    """What to do about rows and files that cannot be read; skip leaves them out and counts them."""
    workers: int = 0
    """Number of processes; 0: one per core."""

    def __post_init__(self) -> None:
        if Path(self.out).suffix not in (".jsonl", ".parquet"):
            raise SdpoError(f"out is {self.out}: name a file that ends in .jsonl or .parquet")
        allowed = {"preset": PRESETS, "format": ("auto", *FORMATS), "bad_rows": ("stop", "skip")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise SdpoError(f"{name} is {getattr(self, name)!r}: use one of {listed(values)}")
        if self.languages == ():
            raise SdpoError("languages: none named. Name some, or any, or leave it out.")
        if self.preset.startswith("paper-") and (self.tools or self.system):
            problem = "--tools and --system are for strict and all-turns"
            raise SdpoError(f"preset is {self.preset}, which gives the published rows: {problem}")
        for name, values in {"tools": ("drop", "keep"), "system": ("keep", "drop")}.items():
            if getattr(self, name) not in (None, *values):
                raise SdpoError(f"{name} is {getattr(self, name)!r}: use one of {listed(values)}")
        for item in self.role_map:
            if not re.fullmatch(r".*=\w+", item, re.DOTALL):
                raise SdpoError(f"role_map is {item!r}: write name=assistant, say")
        if self.workers < 0:
            raise SdpoError(f"workers is {self.workers}: use 1 or more, or 0 for one a core")

    def rules(self) -> ExtractionRules:
        """The preset's rules, with the settings that were given in their place."""
        asked: dict[str, Any] = {
            "shuffle_seed": self.shuffle_seed,
            "max_conversations": self.max_conversations,
            "tools": self.tools,
            "system": self.system,
            "next_response": self.next_response or None,
        }
        rules = PRESETS[self.preset]
        if self.role_map:
            asked["roles"] = (*rules.roles, *chain.from_iterable(map(_roles, self.role_map)))
        if self.languages is not None:
            names = tuple(name.strip().lower() for name in self.languages)
            rules = replace(rules, languages=None if "any" in names else names)
        return replace(rules, **{k: v for k, v in asked.items() if v is not None})


def _roles(item: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """The name as it is written and as `ExtractionRules` looks for it, with what it means."""
    name, _, meaning = item.rpartition("=")
    return (name, meaning), (name.strip().lower(), meaning)
