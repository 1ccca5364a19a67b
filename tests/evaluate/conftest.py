"""Fixtures of the evaluations' tests."""

import pytest

from helpers import tiny


@pytest.fixture(scope="package")
def pair(tmp_path_factory):
    """Folders of two tiny models, base and after."""
    folder = tmp_path_factory.mktemp("pair")
    return [tiny.make_model(folder / name, seed=n) for n, name in enumerate(("base", "after"))]
