"""`sdpo data inspect`: an `Inspection` as a table, JSON and an HTML page, which show the same."""

import json as json_module
from dataclasses import asdict
from pathlib import Path

import tyro
from rich.console import Console

from ...errors import SdpoError
from ...io.files import write_text
from ..manifest import manifest_path, report_path
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
        tokenizer: model or tokenizer, a folder or a name on the hub, to count tokens, too.
        html: self-contained page to write.
        json: JSON file to write.
        samples: number of interactions to show.
        sample_seed: draw them at random with this seed instead of taking the first ones.
    """
    if samples < 0:
        raise SdpoError(f"samples must be at least 0, got {samples}")
    read = [path.resolve() for path in (Path(file), manifest_path(file), report_path(file))]
    for out in filter(None, (html, json)):
        if Path(out).resolve() in read:
            raise SdpoError(f"{out}: a file that is inspected; give another name to write to")
    inspection = inspect(file, tokenizer=tokenizer, samples=samples, sample_seed=sample_seed)
    if json:
        write_text(json, json_module.dumps(asdict(inspection), indent=2, ensure_ascii=False))
    if html:
        write_text(html, to_html(inspection))
    print_tables(inspection, Console())
