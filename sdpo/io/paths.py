"""Which files are named by paths, folders, globs and names of Hugging Face data sets."""

import glob
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from ..errors import DataError

Paths = str | Path | Iterable[str | Path]

_LINES = (".jsonl", ".ndjson")
SUFFIXES = (".parquet", *(name + packed for name in _LINES for packed in ("", ".gz", ".zst")))
_OURS = (".manifest.parquet", ".report.json")
_HUB = "hf://datasets/"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
_HUB_PARTS = re.compile(r"([^/@]+/[^/@]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(.+))?")


def resolve_paths(paths: Paths) -> list[Path]:
    """Every file that `paths` name, each once: in the order given, sorted within a folder or glob.

    A folder stands for all parquet and JSONL files under it or, if there are none, for its `.json`
    files. Hidden files, and the manifests that `prepare` writes, are not data. A name that starts
    with `hf://datasets/`, or that is no path and looks like `owner/name`, is fetched from the
    Hugging Face hub: "hf://datasets/allenai/WildChat@main/data/*.parquet", "allenai/WildChat".

    Raises:
        DataError: a path, glob, folder or hub name gives no file.
    """
    named = [paths] if isinstance(paths, str | Path) else paths
    files: dict[Path, Path] = {}
    for path in named:
        for file in _expand(path):
            files.setdefault(file.resolve(), file)
    if not files:
        raise DataError(
            "no data: the list of paths is empty", hint="Name at least one file or folder"
        )
    return list(files.values())


def _expand(name: str | Path) -> list[Path]:
    if str(name).startswith(_HUB):
        return _from_hub(str(name).removeprefix(_HUB))
    path = Path(name).expanduser()
    if path.is_dir():
        if files := _files_under(path):
            return files
        problem = "the folder holds no .parquet, .jsonl, .ndjson or .json file"
        raise DataError(problem, file=str(path), hint="Check the path")
    if path.is_file():
        return [path]
    if path.exists():
        hint = "Write it to a file first"
        raise DataError("neither a file nor a folder", file=str(path), hint=hint)
    if glob.has_magic(str(path)):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        files = [file for m in matches for file in (_files_under(m) if m.is_dir() else [m])]
        if not files:
            hint = "Check the pattern and the folder"
            raise DataError("the glob matches no file", file=str(path), hint=hint)
        return files
    if _HUB_NAME.fullmatch(str(name)) and not path.parent.is_dir():
        return _from_hub(str(name))
    raise DataError("no such file or folder", file=str(path), hint="Check the path")


def _files_under(folder: Path) -> list[Path]:
    def is_shown(file: Path) -> bool:
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        return not hidden and not file.name.endswith(_OURS) and file.is_file()

    shown = sorted(filter(is_shown, folder.rglob("*")))
    data = [file for file in shown if file.name.endswith(SUFFIXES)]
    return data or [file for file in shown if file.suffix == ".json"]


def _from_hub(name: str) -> list[Path]:
    """Files of `owner/name[@revision][/pattern]` on the hub, in the cache of huggingface_hub."""
    # it takes seconds to import, which only names on the hub need
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    parts = _HUB_PARTS.fullmatch(name)
    if parts is None:
        hint = "Write owner/name, or owner/name@revision/path"
        raise DataError("not the name of a data set", file=name, hint=hint)
    dataset, revision, pattern = parts.groups()
    wanted = [pattern] if pattern else [f"*{suffix}" for suffix in (*SUFFIXES, ".json")]
    try:
        folder = snapshot_download(
            dataset, repo_type="dataset", revision=revision, allow_patterns=wanted
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"no such file or folder, and no data set of the Hugging Face hub ({reason})",
            file=name,
            hint="Check the name, the network and, for gated data, `hf auth login`",
        ) from None
    files = _files_under(Path(folder))  # the cache may hold more than was asked for
    names = {file: str(file.relative_to(folder)) for file in files}
    if found := [f for f in files if any(fnmatch(names[f], pattern) for pattern in wanted)]:
        return found
    hint = "Name a file of it after its name"
    raise DataError("the data set on the hub has no such file", file=name, hint=hint)
