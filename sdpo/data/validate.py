"""`sdpo data validate`: whether training can use a file of interactions, every row looked at.

An error is something at which training would stop; a warning, something that it would do and that
you may not want. A row that is not an interaction counts once, by the first wrong field.
"""

import json as json_module
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..chat import CONTROL_MARK, chat_format
from ..errors import DataError, SdpoError
from ..hindsight import HindsightConfig, encode
from ..interactions import Interaction, RepeatedId, iter_rows
from ..io.files import write_text
from .read.formats import sniff

VERY_LONG = 100_000
"""Characters of one interaction; the published extraction drops longer conversations."""
_SAFE = {c: 0x2400 + c for c in range(32)} | {127: 0x2421}
_LIMITS = ("policy prompt", "hindsight prompt", "response", "history", "follow-up", "question")
"""What `hindsight.Truncated` counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One problem.

    Args:
        kind: what findings are counted by.
        where: the row, as in `DataError.row`.
        field: the field of the row; None: the row or the file as a whole.
        says: the problem and what to do about it.
    """

    severity: Literal["error", "warning"]
    kind: str
    where: str
    field: str | None
    says: str


@dataclass(kw_only=True)
class Validation:
    """Everything found in a file."""

    file: str
    rows: int = 0
    model: str | None
    template: str
    cut: dict[str, int] = field(default_factory=dict)
    """With a model: what the token limits shorten -> in how many interactions. The first three are
    whole sequences, the others what is cut from prompts."""
    findings: list[Finding] = field(default_factory=list)

    def counts(self, severity: str) -> dict[str, int]:
        """Number of findings of each kind, the most frequent first."""
        found = Counter(f.kind for f in self.findings if f.severity == severity)
        return dict(found.most_common())

    @property
    def trainable(self) -> bool:
        """There is no error."""
        return not any(f.severity == "error" for f in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Everything, counts first."""
        counts = {f"{severity}s": self.counts(severity) for severity in ("error", "warning")}
        return {"trainable": self.trainable, **counts, **asdict(self)}


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
        model: model to train, a folder or a name on the hub, to check its template and tokens, too.
        template: hindsight template: a preset, or a text with {followup}.
        json: JSON file to write all findings to.
        show: number of findings to print.
    """
    if show < 0:
        raise SdpoError(f"show must be at least 0, got {show}")
    if json and Path(json).resolve() == Path(file).resolve():
        raise SdpoError(f"{json}: the file to be validated; give another name to write to")
    found = validate(file, model=model, template=template)
    if json:
        write_text(json, json_module.dumps(found.to_json(), indent=2, ensure_ascii=False))
    print_findings(found, Console(), show)
    if not found.trainable:
        raise SystemExit(1)


def validate(
    file: str | Path, *, model: str | None = None, template: str = "paper-offline"
) -> Validation:
    """Look at every row; memory grows with ids and findings, not with texts.

    Raises:
        DataError: the file or the model's tokenizer cannot be read, or there is no row.
        SdpoError: there is no such model, or the template is neither a preset nor holds one
            ``{followup}``.
    """
    config = HindsightConfig(template=template)
    _refuse_logs(Path(file))
    found = Validation(file=str(file), model=model, template=template)
    model_checks = _ModelChecks(model, config, found) if model else None
    usable, weights = 0, 0.0
    for where, row in iter_rows(Path(file)):
        found.rows += 1
        if isinstance(row, DataError):
            found.findings.append(_unusable(row))
            continue
        usable += 1
        weights += row.weight
        found.findings += _warnings(row, where)
        if model_checks:
            found.findings += model_checks(row, where)
    if usable and not weights:
        says = "training on this file changes nothing. Leave the weights out, or score it again."
        found.findings.append(_finding("warning", "every row", "weight", "all 0", says))
    return found


def _refuse_logs(path: Path) -> None:
    try:
        log_format = sniff(path)
    except DataError:
        return  # the rows' own errors say more
    if log_format != "triples":
        raise DataError(
            f"a conversation log ({log_format}), not interactions",
            hint="Make interactions from it with `sdpo data prepare`",
            file=str(path),
        )


def _unusable(error: DataError) -> Finding:
    kind = "given twice" if isinstance(error, RepeatedId) else "not as needed"
    says = str(DataError(error.problem, hint=error.hint))
    if not error.field:
        kind = "unreadable row"
        return Finding(severity="error", kind=kind, where=error.row, field=None, says=says)
    return _finding("error", error.row, error.field, kind, says)


def _finding(
    severity: Literal["error", "warning"], where: str, field: str, kind: str, says: str
) -> Finding:
    """A finding counted under the top-level field: "prompt" of "prompt[3].value"."""
    top = re.split(r"[.[]", field)[0]
    return Finding(severity=severity, kind=f"{top}: {kind}", where=where, field=field, says=says)


# Warnings: what may be a mistake


def _warnings(interaction: Interaction, where: str) -> Iterator[Finding]:
    prompt, response, followup = interaction.prompt, interaction.response, interaction.followup
    if (role := prompt[-1].role) not in ("user", "tool"):
        says = f"the last message, to which the hindsight context is added, has role {role!r}."
        yield _finding("warning", where, "prompt", "ends without a user message", says)
    n = sum(map(len, (response, followup, *(m.content for m in prompt))))
    if n > VERY_LONG:
        says = f"{n:,} characters, more than {VERY_LONG:,}; most of it will be cut."
        yield Finding(severity="warning", kind="row: very long", where=where, field=None, says=says)
    asked = [m.content for m in prompt if m.role == "user"]
    if asked and asked[-1].strip() == followup.strip():
        says = "the same as the prompt's last user message: sent again, it says little of why."
        yield _finding("warning", where, "user_response", "repeats the prompt", says)
    texts = {f"prompt[{i}]": m.content for i, m in enumerate(prompt)}
    texts |= {"completion": response, "user_response": followup}
    for name, text in {**texts, "next_completion": interaction.next_response or ""}.items():
        if mark := CONTROL_MARK.search(text):
            says = f"{mark[0]!r} at character {mark.start()} is a chat format's; here it is text."
            yield _finding("warning", where, name, "control token", says)


# With a model: what its tokenizer makes of the interaction


class _ModelChecks:
    """Encodes interactions as training does."""

    def __init__(self, model: str, config: HindsightConfig, found: Validation) -> None:
        # torch and transformers: seconds, which checks without a model need not pay
        from sdpo_parallel.huggingface import load_tokenizer, resolve_model

        folder = resolve_model(model)
        self.tokenizer, self.config = load_tokenizer(folder), config
        self.chat = chat_format(self.tokenizer)
        self.vocabulary = _vocabulary(folder)
        self.cut = found.cut
        self.cut.update(dict.fromkeys(_LIMITS, 0))

    def __call__(self, interaction: Interaction, where: str) -> Iterator[Finding]:
        ids = interaction.response_token_ids or ()
        if (largest := max(ids, default=0)) >= self.vocabulary:
            name = f"completion_token_ids[{ids.index(largest)}]"
            says = f"{largest} is not a token of the model, which has {self.vocabulary:,}."
            yield _finding("error", where, name, "outside the vocabulary", says)
        if (ended := len(self.chat.sampled_ids(ids)[0])) < len(ids):
            name = f"completion_token_ids[{ended}]"
            says = f"the response ended before; the last {len(ids) - ended:,} are left out."
            yield _finding("warning", where, name, "behind the end", says)
        yield from self._text(interaction, where)
        try:
            encoded = encode(interaction, self.tokenizer, self.config)
        except DataError as error:
            kinds = {"prompt": "refused by the chat template", "completion": "no tokens"}
            if error.field in kinds:
                yield _finding("error", where, error.field, kinds[error.field], str(error))
            else:
                kind = "row: beyond the token limits"
                says = str(error)
                yield Finding(severity="error", kind=kind, where=where, field=None, says=says)
            return
        for name, was_cut in zip(_LIMITS, encoded.truncated, strict=True):
            self.cut[name] += was_cut

    def _text(self, interaction: Interaction, where: str) -> Iterator[Finding]:
        """What the model's own marks in texts are taken for."""
        thought, _ = self.chat.split_thought(interaction.response)
        if thought and interaction.response_token_ids is None:
            says = "it begins with a thinking block, which training strips or keeps as it is told."
            yield _finding("warning", where, "completion", "thinking block", says)
        texts = {f"prompt[{i}]": m.content for i, m in enumerate(interaction.prompt)}
        texts |= {"completion": interaction.response, "user_response": interaction.followup}
        texts["next_completion"] = interaction.next_response or ""
        for name, text in texts.items():
            mark = self.chat.control_token(text)
            if mark and not CONTROL_MARK.search(text):  # else it has been told
                says = f"{mark[0]!r} at character {mark.start()} is the model's; here it is text."
                yield _finding("warning", where, name, "control token", says)


def _vocabulary(folder: str) -> int:
    """Rows of the model's embedding.

    Raises:
        DataError: the folder has no configuration that says so.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
        return config.get_text_config().vocab_size
    except (OSError, ValueError, KeyError, AttributeError) as error:
        problem = f"no model configuration ({str(error).splitlines()[0]})"
        raise DataError(problem, hint="Copy config.json there", file=folder) from None


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
        place = f"{finding.where}, field `{finding.field}`" if finding.field else finding.where
        says = finding.says.translate(_SAFE)
        console.print(Text(f"{finding.severity}: {place}: {says}"), soft_wrap=True)
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
