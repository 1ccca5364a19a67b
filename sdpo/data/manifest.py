"""The files that stand beside a file of interactions, `x.jsonl`: its manifest and its report."""

from pathlib import Path


def manifest_path(out: str | Path) -> Path:
    """`x.manifest.parquet`: where every row came from, and what became of every conversation."""
    return Path(out).with_suffix(".manifest.parquet")


def report_path(out: str | Path) -> Path:
    """`x.report.json`: settings and counts."""
    return Path(out).with_suffix(".report.json")
