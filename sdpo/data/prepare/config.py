"""What to prepare: the configuration behind `sdpo data prepare`."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ...errors import SdpoError
from ...io.fields import listed
from ..filters.guardrails import GuardrailConfig
from ..read.formats import FORMATS, Format
from .rules import PRESETS, ExtractionRules

Preset = Literal["strict", "paper-wildchat", "paper-wildfeedback", "all-turns"]
assert set(Preset.__args__) == set(PRESETS)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to make of which logs."""

    inputs: tuple[str, ...]
    """Files, folders, globs and names of data sets on the Hugging Face hub."""
    out: str
    """The file to write, .jsonl or .parquet; its manifest and report come to stand beside it."""
    preset: Preset = "strict"
    """Which conversations and turns are kept: sdpo.data.prepare.rules says what each does."""
    format: Format | Literal["auto"] = "auto"
    """Of all inputs; auto: recognised, file by file."""
    languages: tuple[str, ...] | None = None
    """Languages to keep, as the log names them; "any" for all; None: as the preset says."""
    shuffle_seed: int | None = None
    """Shuffles; None: as the preset says."""
    max_conversations: int | None = None
    """Stop at so many; None: as the preset says."""
    guardrails: GuardrailConfig = field(default_factory=GuardrailConfig)
    bad_rows: Literal["stop", "skip"] = "stop"
    """Skip: leave out, and count, rows and files that cannot be read."""
    workers: int = 0
    """Processes; 0: one a core."""

    def __post_init__(self) -> None:
        if Path(self.out).suffix not in (".jsonl", ".parquet"):
            raise SdpoError(f"out is {self.out}: name a file that ends in .jsonl or .parquet")
        allowed = {"preset": PRESETS, "format": ("auto", *FORMATS), "bad_rows": ("stop", "skip")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise SdpoError(f"{name} is {getattr(self, name)!r}: use one of {listed(values)}")
        if self.languages == ():
            raise SdpoError("languages: none named. Name some, or any, or leave it out.")
        if self.workers < 0:
            raise SdpoError(f"workers is {self.workers}: use 1 or more, or 0 for one a core")

    def rules(self) -> ExtractionRules:
        """The preset's, with what was asked for in their place."""
        asked: dict[str, Any] = {
            "shuffle_seed": self.shuffle_seed,
            "max_conversations": self.max_conversations,
        }
        rules = replace(PRESETS[self.preset], **{k: v for k, v in asked.items() if v is not None})
        if self.languages is None:
            return rules
        names = tuple(name.strip().lower() for name in self.languages)
        return replace(rules, languages=None if "any" in names else names)
