"""The tables of matmuls, memory and traffic in kernels/README.md, from the rehearsal.

python -m benchmarks.kernel_tables    # writes them between their two markers
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[1] / "kernels" / "README.md"
BEGIN = "<!-- begin: python -m benchmarks.kernel_tables -->\n"
END = "<!-- end -->\n"
SHAPE = [8192, 151_936, 4096]
Row = Mapping[str, Any]


def replaced(text: str, rows: Iterable[Row]) -> str:
    """A document with the tables of these rows of the rehearsal's between the markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{README}: its markers are gone")
    return before + begin + tables(list(rows)) + end + after


def tables(rows: Sequence[Row]) -> str:
    """Markdown."""
    whole = [r for r in rows if list(r["shape"]) == SHAPE and not r["sharded"]]
    return "\n".join([_work(whole), _traffic(whole), _exchanges(rows)])


def _markdown(header: list[str], lines: Iterable[list[str]]) -> str:
    cells = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _merged(pairs: Iterable[tuple[str, list[str]]]) -> list[list[str]]:
    """Lines that differ in their first cell only become one."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name, cells in pairs:
        found.setdefault(tuple(cells), []).append(name)
    return [["; ".join(names), *cells] for cells, names in found.items()]


def _work(rows: Sequence[Row]) -> str:
    """Matmuls and memory, by function and upstream gradient."""
    n, v, d = SHAPE
    header = ["", "upstream gradient", "forward", "backward", "both", "kept, GB", "peak, GB"]
    lines = []
    for kept in (True, False):
        by_function: dict[str, dict[str, list[str]]] = {}
        for r in rows:
            if r["kept"] == kept:
                by_function.setdefault(r["function"], {})[r["upstream"]] = _numbers(r)
        pairs = []
        for function, by_upstream in by_function.items():
            given, free = by_upstream["weights"], by_upstream["any"]
            if given == free:
                pairs.append((function, ["any", *given]))
            else:
                pairs += [(function, ["`token_weights`", *given]), (function, ["any other", *free])]
        if not kept:
            lines.append(["*where G is larger than `grad_bytes`:*", *[""] * (len(header) - 1)])
        lines += _merged(pairs)
    where = f"Matmuls of N·V·D; memory at N={n:,}, V={v:,}, D={d:,} in bfloat16, beyond inputs and"
    return f"{where} gradients.\n\n" + _markdown(header, lines)


def _numbers(row: Row) -> list[str]:
    forward, backward = row["matmuls"]["forward"], row["matmuls"]["backward"]
    memory = (row[name] / 1e9 for name in ("kept_bytes", "peak_bytes"))
    return [
        *(f"{x:.3g}" for x in (forward, backward, forward + backward)),
        *(f"{x:.1f}" for x in memory),
    ]


def _traffic(rows: Sequence[Row]) -> str:
    """Bytes of our kernels, where G is kept."""
    kernels = ("stats_kernel", "divergence_kernel", "softmax_grad_kernel")
    named = [(r["function"], r["traffic"]) for r in rows if r["kept"] and r["upstream"] == "any"]
    pairs = (
        (function, [f"{moved[k]:.3g}" if k in moved else "" for k in kernels])
        for function, moved in named
    )
    header = ["bytes per token and word", *(f"`{k}`" for k in kernels)]
    return "Our kernels' traffic, of both streams together, where G is kept.\n\n" + _markdown(
        header, _merged(pairs)
    )


def _exchanges(rows: Sequence[Row]) -> str:
    """What tensor-parallel ranks exchange."""
    header = [
        "",
        "all-gathers",
        "all-reduces",
        "bytes a rank sends per token",
    ]
    pairs = []
    for r in rows:
        if not r["sharded"] or r["shape"][0] != SHAPE[0]:
            continue
        sent = {name: 0.0 for name in ("allgather_base", "allreduce")}
        number = dict.fromkeys(sent, 0)
        for c in r["collectives"]:
            sent[c["operator"]] += c["bytes"] / r["shape"][0]
            number[c["operator"]] += 1
        numbers = [str(number[name]) for name in ("allgather_base", "allreduce")]
        size = re.sub(r" \+ 0$", "", " + ".join(f"{x:.3g}" for x in sent.values()))
        pairs.append((r["function"], [*numbers, size]))
    return "Collectives of the forward of one chunk (K = 2).\n\n" + _markdown(
        header, _merged(pairs)
    )


def main() -> None:
    """Rehearse, and write the tables."""
    from benchmarks.rehearsal import Stage, rehearse, table_cases  # which hides the process's GPUs

    stage = Stage()
    rows = [rehearse(case, stage).row() for case in table_cases()]
    text = replaced(README.read_text(encoding="utf-8"), rows)
    README.write_text(text, encoding="utf-8")
    print(tables(rows))


if __name__ == "__main__":
    main()
