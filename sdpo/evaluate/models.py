"""What is evaluated, as one word of a command line: a folder, adapters, a run, or a server's model.

    .real/smollm2                       a Hugging Face folder, or a name on the hub
    runs/first                          a run's newest checkpoint
    runs/online@phase-2                 a snapshot of a run
    runs/online@step-40                 a checkpoint of a run
    adapters                            a PEFT folder of adapters
    http://127.0.0.1:8000/v1#qwen       a model of an OpenAI-compatible server

``NAME=`` before any of them says what tables and files call it.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sdpo_parallel.fingerprints import fingerprints
from sdpo_parallel.huggingface import resolve_model

from ..errors import SdpoError
from ..online.snapshots import read_snapshots
from ..train.export import export

_NAME = re.compile(r"(?:([\w.+-]+)=)?(.+)", re.S)
_SERVER = re.compile(r"(https?://[^#]+)#(.+)")
_CHECKPOINT = re.compile(r"step-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model, before it is loaded.

    Attributes:
        name: of the tables' columns.
        where: what the command line says.
        url: of the server that has it; "" for a folder.
        model: the folder's path, or the server's name for it.
        tokenizer: folder of its tokenizer and chat template; "" for a server.
    """

    name: str
    where: str
    url: str = ""
    model: str
    tokenizer: str = ""

    @cached_property
    def identity(self) -> dict[str, str]:
        """What tells it from others: files' hashes, or the server's address and name; read once.

        What stands behind a server's name can change unseen.
        """
        if self.url:
            return {"url": self.url, "model": self.model}
        found = fingerprints(self.model)
        return found if self.model == self.tokenizer else found | fingerprints(self.tokenizer)


def find_models(texts: Sequence[str], out: Path) -> list[Model]:
    """The models that a command line names; runs' checkpoints are exported to ``out / "models"``.

    Raises:
        SdpoError: there is no such model, checkpoint or snapshot, or two have the same name.
    """
    return same_names_refused([find_model(text, out) for text in texts])


def same_names_refused(models: list[Model]) -> list[Model]:
    """The models themselves.

    Raises:
        SdpoError: two have the same name.
    """
    names = [model.name for model in models]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SdpoError(f"two models are called {twice}: put NAME= before one of them")
    return models


def find_model(text: str, out: Path) -> Model:
    """See `find_models`."""
    name, where = _split(text)
    if server := _SERVER.fullmatch(where):
        return Model(name=name or server[2], where=where, url=server[1], model=server[2])
    if where.startswith(("http://", "https://")):
        raise SdpoError(f"{where}: say which of the server's models, as in URL#MODEL")
    path, _, at = where.partition("@")
    if (Path(path) / "checkpoints").is_dir():
        return _of_run(name, where, path, at, out)
    folder = resolve_model(where)
    name = name or Path(where).resolve().name
    return Model(name=name, where=where, model=folder, tokenizer=_tokenizer(folder))


def _split(text: str) -> tuple[str | None, str]:
    found = _NAME.fullmatch(text)
    if found is None or not found[2]:
        raise SdpoError("a model has no name: give a folder, a run or URL#MODEL")
    return found[1], found[2]


def _of_run(name: str | None, where: str, run: str, at: str, out: Path) -> Model:
    step = _step(run, at)
    name = name or f"{Path(run).resolve().name}-{at or f'step-{step}'}"
    folder = out / "models" / f"{name}-step-{step}"
    if not folder.is_dir():  # bfloat16 would round off what a small learning rate has changed
        export(run, out=str(folder), step=step, dtype="float32")
    return Model(name=name, where=where, model=str(folder), tokenizer=str(folder))


def _step(run: str, at: str) -> int:
    """The checkpoint that a snapshot's name, "step-N" or nothing at all means."""
    names = [path.name for path in (Path(run) / "checkpoints").iterdir()]
    there = sorted(int(m[1]) for name in names if (m := _CHECKPOINT.fullmatch(name)))
    if not at and there:
        return there[-1]
    snapshots = {s.name: s.step for s in read_snapshots(run)}
    numbered = _CHECKPOINT.fullmatch(at)
    step = int(numbered[1]) if numbered else snapshots.get(at)
    if step in there:
        return step
    known = ", ".join([*snapshots, *(f"step-{n}" for n in there)]) or "none"
    gone = f"the checkpoint of {at!r} is gone" if step is not None else f"nothing is called {at!r}"
    raise SdpoError(f"{run}: {gone}; there are: {known}")


def _tokenizer(folder: str) -> str:
    """The folder itself, or of adapters alone their base's."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file() or (Path(folder) / "tokenizer.json").is_file():
        return folder
    base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise SdpoError(f"{path}: no base_model_name_or_path, so that its base is not known")
    return resolve_model(base)
