"""`sdpo data inspect`: an `Inspection` as a table, JSON and an HTML page, which show the same."""

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.console import Console

from ...io.files import write_text
from ..manifest import manifest_path, report_path

if TYPE_CHECKING:
    pass

from .inspection import inspect
from .page import to_html
from .tables import print_tables


def inspect_command(
    file: tyro.conf.Positional[str],
    /,
    *,
    tokenizer: str | None = None,
    html: str | None = None,
    json: str | None = None,
    samples: int = 2,
    sample_seed: int | None = None,
) -> None:
    """Show what is in a file of interactions, or in a conversation log.

    Args:
        file: interactions, as `sdpo data prepare` writes them, or a log that it would read.
        tokenizer: folder of a model or tokenizer, to count tokens too.
        html: a self-contained page to write.
        json: a JSON file to write.
        samples: how many interactions to show.
        sample_seed: draw them at random instead of taking the first ones.
    """
    if samples < 0:
        raise ValueError(f"samples must be at least 0, got {samples}")
    for out in filter(None, (html, json)):
        _check_out(Path(out), Path(file))
    inspection = inspect(file, tokenizer=tokenizer, samples=samples, sample_seed=sample_seed)
    if json:
        _write(json, json_module.dumps(asdict(inspection), indent=2, ensure_ascii=False))
    if html:
        _write(html, to_html(inspection))
    print_tables(inspection, Console())


def _check_out(out: Path, file: Path) -> None:
    for source in (file, manifest_path(file), report_path(file)):
        if out.resolve() == source.resolve():
            raise ValueError(f"{out}: is what is to be inspected; give another name to write to")


def _write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
