"""`sdpo data validate`: whether training can use a file of interactions, every row looked at.

An error is what training would stop at; a warning, what it would do and you may not mean. A row
that is not an interaction counts once, by the first of its fields that is wrong.
"""

import json as json_module
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..conversations import DataError
from ..io.files import write_text

if TYPE_CHECKING:
    from ..interactions import Interaction

VERY_LONG = 100_000
"""Characters of an interaction; the published extraction drops longer conversations."""
# Marks of ChatML, Llama 3, Mistral, Gemma, DeepSeek and of reasoning, which tokenizers turn into
# special tokens. Not Llama 2's </s>: HTML has it too.
_CONTROL = re.compile(r"<[|｜][^<>|｜\s]{1,40}[|｜]>|\[/?INST\]|<(?:start|end)_of_turn>|</?think>")
_FIELD = re.compile(r"field `?([\w.\[\]]*\w\]?)`?: ")
_SAFE = {c: 0x2400 + c for c in range(32)} | {127: 0x2421}
_LIMITS = ("policy prompt", "hindsight prompt", "response")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One problem: of which kind, in which row and field (None: the row, or file, as a whole)."""

    severity: Literal["error", "warning"]
    kind: str
    where: str
    field: str | None
    says: str


@dataclass(kw_only=True)
class Validation:
    """All findings of a file."""

    file: str
    model: str | None
    template: str
    rows: int = 0
    findings: list[Finding] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    """Interactions that training's token limits shorten, by what they shorten; with a model."""

    def counts(self, severity: str) -> dict[str, int]:
        """Findings by kind, the most frequent first."""
        found = Counter(f.kind for f in self.findings if f.severity == severity)
        return dict(found.most_common())

    @property
    def trainable(self) -> bool:
        """No error."""
        return not any(f.severity == "error" for f in self.findings)

    def to_json(self) -> dict[str, Any]:
        """All of it, counts first."""
        everything = asdict(self)
        counted = {f"{s}s": self.counts(s) for s in ("error", "warning")}
        return {
            "trainable": self.trainable,
            **counted,
            **{name: everything[name] for name in ("file", "rows", "model", "template", "cut")},
            "findings": everything["findings"],
        }


def validate_command(
    file: tyro.conf.Positional[str],
    /,
    *,
    model: str | None = None,
    template: str = "paper-offline",
    json: str | None = None,
    show: int = 20,
) -> None:
    """Check that training can use a file of interactions: 0 if it can, 1 if not, 2 if unreadable.

    Args:
        file: interactions, as `sdpo data prepare` writes them.
        model: folder of the model to train, to check its chat template and tokens too.
        template: of the hindsight prompt: a preset, or text with {followup}.
        json: a file to write all findings to.
        show: how many findings to print.
    """
    if show < 0:
        raise ValueError(f"show must be at least 0, got {show}")
    if json and Path(json).resolve() == Path(file).resolve():
        raise ValueError(f"{json}: is what is to be validated; give another name to write to")
    found = validate(file, model=model, template=template)
    if json:
        Path(json).parent.mkdir(parents=True, exist_ok=True)
        write_text(json, json_module.dumps(found.to_json(), indent=2, ensure_ascii=False))
    print_findings(found, Console(), show)
    if not found.trainable:
        raise SystemExit(1)


def validate(
    file: str | Path, *, model: str | None = None, template: str = "paper-offline"
) -> Validation:
    """Looks at every row; memory grows with ids and findings, not with texts.

    Raises:
        DataError: the file or the model's tokenizer cannot be read, or there is no row.
        ValueError: the template is neither a preset nor holds one ``{followup}``.
    """
    from ..hindsight import resolve_template
    from ..interactions import iter_rows

    resolve_template(template)
    _check_is_no_log(Path(file))
    found = Validation(file=str(file), model=model, template=template)
    of_model = _ModelChecks(model, template, found) if model else None
    usable, weights = 0, 0.0
    for where, row in iter_rows(Path(file)):
        found.rows += 1
        where = where.removeprefix(f"{file}, ")
        if isinstance(row, DataError):
            found.findings.append(_unusable(row, where, f"{file}, "))
            continue
        usable += 1
        weights += row.weight
        found.findings += _warnings(row, where)
        if of_model:
            found.findings += of_model(row, where)
    if usable and not weights:
        found.findings.append(_all_switched_off())
    return found


def _check_is_no_log(path: Path) -> None:
    from .read.formats import sniff

    try:
        log_format = sniff(path)
    except DataError:
        return  # its rows tell better what is wrong
    if log_format != "triples":
        raise DataError(
            f"{path}: a conversation log ({log_format}), not interactions; make them from it by "
            "`sdpo data prepare`"
        )


def _unusable(error: DataError, where: str, file: str) -> Finding:
    says = str(error).removeprefix(file).removeprefix(f"{where}, ")
    match = _FIELD.match(says)
    name = match[1] if match else None
    says = says[match.end() :] if match else says
    kind = f"{_top(name)}: not as needed" if name else "unreadable row"
    if name == "id" and " is the id of " in says:
        kind = "id: given twice"
    return Finding(severity="error", kind=kind, where=where, field=name, says=says)


def _top(name: str) -> str:
    """The row's field that "prompt[3].value" is in."""
    return re.split(r"[.[]", name)[0]


def _all_switched_off() -> Finding:
    return Finding(
        severity="warning",
        kind="weight: all 0",
        where="every row",
        field="weight",
        says="training on this file changes nothing. Leave the weights out, or score it again.",
    )


# Warnings: what one interaction may be by mistake


def _warnings(interaction: "Interaction", where: str) -> Iterator[Finding]:
    for field_name, kind, says in (
        *_of_ending(interaction),
        *_of_length(interaction),
        *_of_followup(interaction),
        *_of_control(interaction),
    ):
        kind = f"{_top(field_name or 'row')}: {kind}"
        yield Finding(severity="warning", kind=kind, where=where, field=field_name, says=says)


_Warnings = Iterator[tuple[str | None, str, str]]


def _of_ending(interaction: "Interaction") -> _Warnings:
    if (role := interaction.prompt[-1].role) != "user":
        says = f"the last message is of role {role!r}; the hindsight note is appended to that one."
        yield "prompt", "ends without a user message", says


def _of_length(interaction: "Interaction") -> _Warnings:
    texts = (interaction.response, interaction.followup)
    n = sum(map(len, texts)) + sum(len(m.content) for m in interaction.prompt)
    if n > VERY_LONG:
        says = f"{n:,} characters, more than {VERY_LONG:,}; most of it will be cut."
        yield None, "very long", says


def _of_followup(interaction: "Interaction") -> _Warnings:
    asked = [m.content for m in interaction.prompt if m.role == "user"]
    if asked and asked[-1].strip() == interaction.followup.strip():
        says = "the same as the prompt's last user message: sent again, it says little of why."
        yield "user_response", "repeats the prompt", says


def _of_control(interaction: "Interaction") -> _Warnings:
    texts = {f"prompt[{i}]": m.content for i, m in enumerate(interaction.prompt)}
    texts |= {"completion": interaction.response, "user_response": interaction.followup}
    for name, text in texts.items():
        if mark := _CONTROL.search(text):
            says = f"{mark[0]!r} at character {mark.start()} is a chat format's own; not text."
            yield name, "control token", says


# With a model: what its tokenizer makes of the interaction


class _ModelChecks:
    """Encodes interactions as training does."""

    def __init__(self, folder: str, template: str, found: Validation) -> None:
        from ..hindsight import HindsightConfig, load_tokenizer

        self.tokenizer = load_tokenizer(folder)
        self.config = HindsightConfig(template=template)
        self.vocabulary = _vocabulary(folder)
        self.cut = found.cut
        self.cut.update(dict.fromkeys(_LIMITS, 0))

    def __call__(self, interaction: "Interaction", where: str) -> Iterator[Finding]:
        from ..hindsight import encode

        yield from _outside(interaction, where, self.vocabulary)
        try:
            encoded = encode(interaction, self.tokenizer, self.config)
        except DataError as error:
            yield _not_encoded(error, where)
            return
        for name, was_cut in zip(_LIMITS, encoded.truncated, strict=True):
            self.cut[name] += was_cut


def _vocabulary(folder: str) -> int:
    """Rows of the model's embedding.

    Raises DataError: the folder has no configuration that says so.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
        return config.get_text_config().vocab_size
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{folder}: no model configuration ({reason}); copy config.json") from None


def _outside(interaction: "Interaction", where: str, vocabulary: int) -> Iterator[Finding]:
    ids = interaction.response_token_ids or ()
    if (largest := max(ids, default=0)) >= vocabulary:
        name = f"completion_token_ids[{ids.index(largest)}]"
        says = f"{largest} is no token of the model, which has {vocabulary:,}."
        kind = "completion_token_ids: outside the vocabulary"
        yield Finding(severity="error", kind=kind, where=where, field=name, says=says)


def _not_encoded(error: DataError, where: str) -> Finding:
    no_tokens = "field completion" in str(error)
    kind = "completion: no tokens" if no_tokens else "prompt: refused by the chat template"
    name = kind.partition(":")[0]
    return Finding(severity="error", kind=kind, where=where, field=name, says=str(error))


# Showing


def print_findings(found: Validation, console: Console, show: int) -> None:
    """The verdict, all kinds with their counts, and the first findings, errors first."""
    verdict = "training can use it" if found.trainable else "not fit for training"
    console.print(Text(f"{found.file}: {found.rows:,} rows, {verdict}"), soft_wrap=True)
    if found.findings:
        console.print(_kinds(found))
    for name, n in found.cut.items():
        console.print(f"{name}: {n:,} cut by the token limit", highlight=False)
    for finding in sorted(found.findings, key=lambda f: f.severity == "warning")[:show]:
        _print_finding(finding, console)
    if (more := len(found.findings) - show) > 0:
        console.print(f"and {more:,} more (--show N prints N, --json FILE writes all)")


def _kinds(found: Validation) -> Table:
    table = Table()
    for column in ("", "kind", "count"):
        table.add_column(column, justify="right" if column == "count" else "left")
    for severity, colour in (("error", "red"), ("warning", "yellow")):
        for kind, n in found.counts(severity).items():
            table.add_row(Text(severity, style=colour), Text(kind), f"{n:,}")
    return table


def _print_finding(finding: Finding, console: Console) -> None:
    place = f"{finding.where}, field `{finding.field}`" if finding.field else finding.where
    says = finding.says.translate(_SAFE)
    console.print(Text(f"{finding.severity}: {place}: {says}"), soft_wrap=True)
