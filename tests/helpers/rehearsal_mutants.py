"""Defects, planted one at a time in a process that rehearses, and what the rehearsal says of each.

python tests/helpers/rehearsal_mutants.py    # JSON: name -> problems, matmuls, memory, launches
"""

import json
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

from benchmarks.rehearsal import QWEN, Case, Stage, rehearse  # first: it hides the GPUs

import torch  # isort: skip
from sdpo_kernels._impl import chunked, matmul, rows_triton, tuning

SMALL = Case(shape=(301, 5003, 250), chunk_rows=100)


def _in_the_loop(what):
    """Something more is done with each chunk's hidden states."""

    def logits(hidden, weight, out):
        what(hidden)
        real(hidden, weight, out)

    real = chunked.logits
    return mock.patch.object(chunked, "logits", logits)


def _small_launches(hidden):
    for _ in range(7):
        hidden.abs()


def _argument(name, change):
    """An argument of every launch changed."""

    def launch(kernel, spec, z_CV, tiles, **arguments):
        if isinstance(arguments.get(name), torch.Tensor):
            arguments[name] = change(arguments[name])
        return real(kernel, spec, z_CV, tiles, **arguments)

    real = rows_triton._launch
    return mock.patch.object(rows_triton, "_launch", launch)


def _dw(change):
    """Another way to add to dW."""
    return mock.patch.object(chunked, "add_weight_gradient", change)


def _two_dtypes(dweight, grad, hidden, *_):
    torch.addmm(dweight, grad.T, hidden.float(), out_dtype=torch.float32, out=dweight)


def _no_out_dtype(hidden, weight, out):
    torch.mm(hidden, weight.T, out=out)


def _twice(*arguments):
    matmul.hidden_gradient(*arguments)
    return matmul.hidden_gradient(*arguments)


@contextmanager
def _pageable():
    with mock.patch.object(torch.Tensor, "pin_memory", lambda self: self):
        yield


@contextmanager
def _whole_logits():
    with mock.patch.object(chunked, "_chunk_rows", lambda x, *_: x.student_hidden.shape[0]):
        yield


def _spilling(*_):
    return {"BLOCK": 16_384, "num_warps": 4, "maxnreg": 64}


def _unguarded():
    class Nothing:
        def __init__(self, _): ...
        def __enter__(self): ...
        def __exit__(self, *_): ...

    return mock.patch.object(torch.cuda, "device_of", Nothing)


MUTANTS = {
    "nothing": (SMALL, lambda: mock.patch.object(tuning, "ROW_WARPS", tuning.ROW_WARPS)),
    "an item in the loop": (SMALL, lambda: _in_the_loop(lambda h: h.amax().item())),
    "a selection by a mask": (SMALL, lambda: _in_the_loop(lambda h: h[h > 0])),
    "an argument in host memory": (SMALL, lambda: _argument("norm_ptr", lambda x: x.cpu())),
    "columns for rows": (SMALL, lambda: _argument("norm_ptr", lambda x: x.T.contiguous().T)),
    "no device guard": (SMALL, _unguarded),
    "rows at an odd stride": (SMALL, lambda: mock.patch.object(chunked, "row_length", lambda v: v)),
    "operands of two dtypes": (replace(SMALL, kept=False), lambda: _dw(_two_dtypes)),
    "no out_dtype": (SMALL, lambda: mock.patch.object(chunked, "logits", _no_out_dtype)),
    "logits of all tokens": (replace(SMALL, shape=QWEN, chunk_rows=None), _whole_logits),
    "tiles that spill": (SMALL, lambda: mock.patch.object(tuning, "row_tiles", _spilling)),
    "one matmul more": (SMALL, lambda: mock.patch.object(chunked, "hidden_gradient", _twice)),
    "a mask that is not pinned": (replace(SMALL, mask="host"), _pageable),
    "small launches": (SMALL, lambda: _in_the_loop(_small_launches)),
}
"""By name: a call, and a context in which it is defective."""


def main() -> None:
    stage = Stage()
    found = {}
    for name, (case, planted) in MUTANTS.items():
        with planted():
            found[name] = rehearse(case, stage).row()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
