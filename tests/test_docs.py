"""The documentation names only what exists: links, files, modules, flags and commands."""

import contextlib
import importlib.util
import io
import re
from functools import cache
from pathlib import Path

import pytest

from benchmarks.models import QWEN3
from sdpo.cli import COMMANDS, GROUPS, main

ROOT = Path(__file__).parents[1]
PLACES = (ROOT, ROOT / "kernels", ROOT / "parallel", ROOT / "kernels" / "sdpo_kernels")
"""Folders that documents name files from."""
FOLDERS = (
    "*.md",
    "docs/*.md",
    "examples/*/*.md",
    "[a-z]*/README.md",
    "sdpo/*/*.md",
    "kernels/*.md",
)
PAGES = sorted({p for pattern in FOLDERS for p in ROOT.glob(pattern)})
LINK = re.compile(r"\]\((?!https?://)([^)#\s]+)")
FILE = re.compile(r"(?<![\w/.-])[\w.-]+(?:/[\w.-]+)+\.(?:py|sh|md|toml|sbatch|svg)")
MODULE = re.compile(r"\b(?:sdpo|sdpo_parallel|sdpo_kernels|benchmarks)(?:\.(?!NAME)\w+)+")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*[a-z\d]")
COMMAND = re.compile(
    r"^(?:sdpo ((?:data|users|evaluate) \w+|[a-z-]+)|(?:sbatch \S+ )?parallel/launch/\S+)(.*)", re.M
)
OF_OTHERS = {"--shutdown-timeout", "--kill"}
OF_OTHERS |= {"--api-key", "--generation-config", "--tensor-parallel-size"}
"""Flags of torchrun, of a benchmark, and of vLLM."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def code(text: str) -> list[str]:
    """Blocks and spans of code."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.S)
    return blocks + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))


@pages
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pages
def test_named_files_and_modules_exist(page):
    for span in code(page.read_text(encoding="utf-8")):
        for name in FILE.findall(span):
            assert any((place / name).exists() for place in (*PLACES, page.parent)), name
        if page.name != "CHANGELOG.md":  # which names what has gone, too
            for name in MODULE.findall(span):
                assert _exists(name), name


def _exists(name: str) -> bool:
    """A module, or an attribute of one."""
    parent, _, last = name.rpartition(".")
    try:
        if importlib.util.find_spec(name) is not None:
            return True
    except ModuleNotFoundError:
        pass
    return hasattr(importlib.import_module(parent), last)


@pages
def test_named_flags_and_commands_exist(page):
    """After `sdpo COMMAND` that command's own; a flag alone is any command's, or a group's name."""
    for span in code(page.read_text(encoding="utf-8")):
        for name, rest in COMMAND.findall(span.replace("\\\n", " ")):
            known = flags(tuple(name.split()) or ("train",))
            missing = [f for f in FLAG.findall(rest.partition(" #")[0]) if f not in known]
            assert not missing, (name, missing)
        if span.startswith("--") and page.parent.name not in ("benchmarks", "kernels"):
            for flag in set(FLAG.findall(span)) - OF_OTHERS:
                assert any(f"{known}.".startswith(f"{flag}.") for known in every_flag()), flag


@cache
def flags(command: tuple[str, ...]) -> frozenset[str]:
    """What `sdpo COMMAND --help` knows; recipes share theirs, but for their objectives'."""
    if command == ("users", "train"):  # which hands them on
        command = ("online",)
    recipes = {("train",): ("paper-offline", "sft", "dpo"), ("online",): ("online",)}
    if command in recipes:
        return frozenset().union(*(flags((*command, recipe)) for recipe in recipes[command]))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert not stop.value.code, f"sdpo {' '.join(command)}: no such command"
    return frozenset(FLAG.findall(said.getvalue()))


@cache
def every_flag() -> frozenset[str]:
    commands = [(name,) for name in COMMANDS if name not in GROUPS]
    commands += [(group, name) for group, inner in GROUPS.items() for name in inner]
    return frozenset().union(*map(flags, commands))


@pytest.fixture
def picture():
    """The script that draws docs/prefixes.md's picture."""
    path = ROOT / "docs" / "assets" / "trie_row.py"
    spec = importlib.util.spec_from_file_location("trie_row", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_of_shared_prefixes_prints_what_the_page_says(picture):
    said, _ = picture.made()
    page = picture.PAGE.read_text(encoding="utf-8")
    (output,) = re.findall(r"```\n(none .*?)```", page, re.S)
    assert [line.rstrip() for line in said.splitlines()] == output.splitlines()


def test_the_picture_of_a_trie_row_is_of_the_examples_rows(picture):
    """And its grid is the mask that attention computes with."""
    _, (policy, hindsight) = picture.made()
    drawn = picture.drawing(policy, hindsight)
    assert picture.PICTURE.read_text(encoding="utf-8") == drawn
    alone, joined = policy.sight.dense(), hindsight.sight.behind(policy).dense()
    own = int(alone.sum()) + int(joined[..., policy.tokens_BT.shape[1] :].sum())
    kept = int(joined[..., : policy.tokens_BT.shape[1]].sum())
    assert drawn.count('"own"') == own + 1 and drawn.count('"kept"') == kept + 1, "and a legend"


def test_the_memory_of_kept_keys_is_what_the_page_says():
    c = QWEN3["qwen3-8b"]
    each = 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"] * 2
    page = (ROOT / "docs" / "prefixes.md").read_text(encoding="utf-8")
    assert f"{each:,} bytes a slot for Qwen3-8B, {each * 16_384 / 2**30:g} GiB for" in page
