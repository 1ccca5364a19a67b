"""The folder of a demo, which the next demo may replace."""

import shutil
from pathlib import Path

from ..errors import SdpoError

MARKER = ".sdpo-demo"
"""File that marks a demo's folder."""


def make_room(folder: Path) -> None:
    """Make an empty folder, in place of an earlier demo's.

    Raises:
        SdpoError: the folder holds something else, which is not deleted.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise SdpoError(f"{folder} holds something that is no demo: choose another --out")
        for path in folder.iterdir():  # the marker stays, should this be interrupted
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != MARKER:
                path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
