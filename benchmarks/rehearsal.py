"""Every function of sdpo_kernels as it would run on a GPU, on a machine without one.

    python -m benchmarks.rehearsal [--quick] [--sm 80 90 100 120] [--out results.jsonl]

Tensors are fake: they say that they are on a GPU, have real sizes and hold no data. The operators'
own bodies run on them, forward and backward, and every Triton launch is compiled with the
specialisation it would have, down to machine code, for each architecture. Per call it says how
many matmuls there are, what is allocated at the peak, how many small launches a chunk takes, and
what is wrong: a kernel that does not compile, spills or takes too much shared memory, a grid, a
pointer or a layout that cannot be, what cuBLAS refuses, what the host waits for, what a CUDA graph
cannot capture, narrow accesses. Exits 1 if anything is.

It does not see races, wrong numbers, speed, the order of streams, temporaries within an operator of
torch's, or torch.compile.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # fake tensors must not ask a driver
os.environ.pop("TRITON_INTERPRET", None)

import functools
import inspect
import itertools
import logging
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import triton
import tyro
from rich.console import Console
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction

from benchmarks.absent_gpu import SHARED_LIMIT, AbsentGPU, pretend
from benchmarks.operator_stream import (
    Collective,
    Event,
    Kernel,
    Matmul,
    Recorder,
    Small,
    allocated,
)
from benchmarks.report import Output, grid
from sdpo_kernels import (
    VocabShard,
    linear_forward_kl,
    linear_jsd,
    linear_logprob,
    linear_reverse_kl,
    linear_sampled_token,
    linear_topk_divergence,
)
from sdpo_kernels._impl import op, rows_torch, tuning

SMALL_LAUNCHES = 6
"""Launches of torch's per chunk, beside its matmuls."""
PADDED = 16
"""Rows of logits and of G may be padded to a multiple."""
RANKS, RANK = 8, 3
"""Of the tensor-parallel group."""
QWEN = (8192, 151_936, 4096)
SHAPES = (
    (1500, 151_936, 4096),
    (300, 151_665, 1024),
    (300, 50_257, 768),
    (301, 128_260, 2048),
    (301, 5003, 250),
    (129, 1000, 64),
    (7, 129, 24),
    (1, 3, 8),
    (0, 1000, 64),
)
"""N, V, D: real vocabularies, odd ones among them, several chunks, and the smallest."""
FEW_LOGITS = 2 * 10**6
"""More are not rehearsed with ``impl="torch"``, whose operators are many and small."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call and its backward."""

    function: str = "reverse KL"
    shape: tuple[int, int, int] = QWEN
    """N, V, D; V of this rank, where the vocabulary is split."""
    dtype: str = "bfloat16"
    impl: str = "triton"
    upstream: str = "weights"
    """weights: known in the call; any: a gradient per token; none: no gradient is asked for."""
    kept: bool = True
    """Whether G may be kept."""
    mask: str = "none"
    """In "host" or "device" memory."""
    transforms: bool = False
    """Bias, softcap and temperature."""
    own_head: bool = False
    """The teacher's hidden states and lm_head are its own."""
    sharded: bool = False
    frozen: str = "none"
    """"weight" or "hidden" gets no gradient."""
    chunk_rows: int | None = None
    """Tokens whose logits fit in ``chunk_bytes``; None: the default for a GPU."""

    def __str__(self) -> str:
        usual = asdict(Case())
        changed = {k: v for k, v in asdict(self).items() if v != usual[k] or k == "function"}
        return ", ".join(f"{k}={v}" if k != "function" else str(v) for k, v in changed.items())


@dataclass
class Report:
    """What a call would do."""

    case: Case
    events: list[Event]
    problems: list[str]
    peak_bytes: int
    """Beyond inputs and the gradients that stay."""
    kept_bytes: int
    """Alive between forward and backward, beyond inputs."""

    def matmuls(self, backward: bool | None = None) -> float:
        """In units of N V D multiply-adds."""
        n, v, d = self.case.shape
        flops = sum(
            e.flops for e in self.events if isinstance(e, Matmul) and backward in (None, e.backward)
        )
        return flops / (2.0 * n * v * d) if n else 0.0

    def of(self, kind: type[Event]) -> list[Any]:
        """Events of a kind."""
        return [e for e in self.events if isinstance(e, kind)]

    @property
    def chunks(self) -> list[int]:
        """Where in the stream statistics are computed, once for each chunk."""
        return [i for i, e in enumerate(self.events) if e.name == "stats_kernel"]

    def small_launches(self) -> int:
        """From one chunk's statistics to the next one's, where they are fewest: between two passes
        over the chunks there are more. 0 if there are too few chunks to tell."""
        if len(self.chunks) < 3:
            return 0
        periods = (self.events[a:b] for a, b in itertools.pairwise(self.chunks))
        return min(sum(isinstance(e, Small) for e in p) for p in periods)

    def traffic(self) -> dict[str, float]:
        """Bytes that each kernel of ours moves, per token and word of the vocabulary."""
        n, v, _ = self.case.shape
        moved: dict[str, float] = defaultdict(float)
        for e in self.of(Kernel):
            moved[e.name] += e.bytes / max(1, n * v)
        return dict(moved)

    def row(self) -> dict[str, Any]:
        """For a file."""
        kernels = {e.launch.key: e for e in self.of(Kernel)}
        return dict(
            benchmark="rehearsal",
            contender="sdpo",
            case=str(self.case),
            **asdict(self.case),
            collectives=[dict(operator=e.name, bytes=e.bytes) for e in self.of(Collective)],
            traffic=self.traffic(),
            matmuls=dict(forward=self.matmuls(False), backward=self.matmuls(True)),
            flops=sum(e.flops for e in self.events),
            bytes=sum(e.bytes for e in self.events),
            gemms=len(self.of(Matmul)),
            launches=len(self.of(Kernel)),
            small=len(self.of(Small)),
            small_per_chunk=self.small_launches(),
            chunks=len(self.chunks),
            peak_bytes=self.peak_bytes,
            kept_bytes=self.kept_bytes,
            kernels={
                f"{name} {hashed}": {str(sm): asdict(m) for sm, m in e.launch.machines.items()}
                for (name, hashed), e in kernels.items()
            },
            problems=self.problems,
        )


def _pair(function: Callable, **own) -> Callable:
    return lambda x, options: function(
        x.hidden, x.weight, x.teacher, x.teacher_weight, targets=x.targets, **own, **options
    )


def _clipped(x, options):
    return _pair(linear_sampled_token, old_logp=x.old_logp, ppo_clip=0.2)(x, options)


def _truncated(x, options):
    return _pair(linear_sampled_token, old_logp=x.old_logp, importance_clip=2.0)(x, options)


def _centred(x, options):
    return _pair(linear_sampled_token, centre=x.sequence, counted=x.counted)(x, options)


FUNCTIONS: dict[str, Callable] = {
    "reverse KL": _pair(linear_reverse_kl),
    "forward KL": _pair(linear_forward_kl),
    "JSD": _pair(linear_jsd),
    "sampled token": _pair(linear_sampled_token),
    "sampled token, PPO clip": _clipped,
    "sampled token, importance clip": _truncated,
    "sampled token, centred": _centred,
    "top K": _pair(linear_topk_divergence, k=2),
    "top K, the teacher's, JSD": _pair(
        linear_topk_divergence, k=2, support="teacher", divergence="jsd"
    ),
    "log p(y)": lambda x, options: linear_logprob(x.hidden, x.weight, x.targets, **options),
}
"""By name: a call with inputs and options."""


class Stage:
    """The pretended GPU, the operators' bodies in their place, and a group of ranks."""

    def __init__(self):
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        # what fails in a meta kernel is reported as a problem
        logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
        self.gpu: AbsentGPU = pretend()
        _remember_tensors()
        for name, operator in list(vars(op).items()):
            if isinstance(operator, CustomOpDef):
                setattr(op, name, _body(operator))

    @functools.cached_property
    def group(self) -> dist.ProcessGroup:
        """Ranks whose collectives do nothing."""
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=RANK, world_size=RANKS, store=FakeStore())
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    @contextmanager
    def recording(self, recorder: Recorder) -> Iterator[None]:
        self.gpu.on_launch = recorder.launched
        try:
            with recorder:
                yield
        finally:
            self.gpu.on_launch = lambda launch: None


def _body(operator: CustomOpDef) -> Callable:
    """A custom operator that runs its body where it would run its fake kernel; its own backward."""

    def call(*args, **kwargs):
        class Node(torch.autograd.Function):
            @staticmethod
            def forward(*inputs):
                return operator._init_fn(*inputs, **kwargs)

            @staticmethod
            def setup_context(ctx, inputs, output):
                if operator._setup_context_fn is not None:
                    named = dict(inputs=inputs, output=output)
                    if kwargs:
                        named |= dict(keyword_only_inputs=kwargs)
                    operator._setup_context_fn(ctx, **named)

            @staticmethod
            def backward(ctx, *grads):
                assert operator._backward_fn is not None
                return operator._backward_fn(ctx, *grads)

        return Node.apply(*args)

    return call


def _remember_tensors() -> None:
    """Functions in Python have edges for arguments that are tensors: their nodes say which."""
    real = inspect.getattr_static(torch.autograd.Function, "apply")

    def apply(cls, *args, **kwargs):
        out = real.__get__(None, cls)(*args, **kwargs)
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, Tensor) and isinstance(x.grad_fn, BackwardCFunction):
                node: Any = x.grad_fn
                node.tensors = [isinstance(a, Tensor) for a in args]
        return out

    torch.autograd.Function.apply = classmethod(apply)


def backward(root: Tensor, gradient: Tensor) -> list[Tensor]:
    """The gradients of leaves. Autograd's engine asks for a CUDA context; this one does not."""
    assert root.grad_fn is not None
    waits: dict[Any, int] = defaultdict(int)
    seen, stack = {root.grad_fn}, [root.grad_fn]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                waits[node] += 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
    given: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    given[root.grad_fn][root.output_nr] = gradient
    leaves, ready = [], [root.grad_fn]
    del seen, root, gradient
    while ready:
        node: Any = ready.pop()
        grads = given.pop(node, {})
        if hasattr(node, "variable"):
            leaves += grads.values()
            continue
        own = isinstance(node, BackwardCFunction)
        apply = node.apply if own else node
        found = apply(*(grads.pop(i, None) for i in range(len(node._input_metadata))))
        found = found if isinstance(found, tuple) else (found,)
        if own:  # gradients by arguments; edges by those that are tensors
            found = tuple(itertools.compress(found, node.tensors))
        for (after, number), grad in zip(node.next_functions, found, strict=False):
            if after is None:
                continue
            if grad is not None:
                known = given[after].get(number)
                given[after][number] = grad if known is None else known + grad
            waits[after] -= 1
            if not waits[after]:
                ready.append(after)
        del found, grads
    return leaves


def inputs(case: Case) -> SimpleNamespace:
    """Fake tensors on a GPU."""
    n, v, d = case.shape
    dtype = getattr(torch, case.dtype)

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda:0")

    wanted = case.upstream != "none"
    return SimpleNamespace(
        hidden=new(n, d).requires_grad_(wanted and case.frozen != "hidden"),
        weight=new(v, d).requires_grad_(wanted and case.frozen != "weight"),
        teacher=new(n, d // 2 if case.own_head else d),
        teacher_weight=new(v, d // 2) if case.own_head else None,
        targets=new(n, dtype=torch.long),
        old_logp=new(n, dtype=torch.float32),
        sequence=new(n, dtype=torch.long),
        counted=new(n, dtype=torch.bool),
        token_weights=new(n, dtype=torch.float32),
        bias=new(v).requires_grad_(wanted),
        teacher_bias=new(v),
        mask=new(n, dtype=torch.bool),
        upstream=new(n if case.upstream == "any" else 1, dtype=torch.float32),
    )


def options_of(case: Case, x: SimpleNamespace, stage: Stage) -> dict[str, Any]:
    """Keyword arguments of the call."""
    options: dict[str, Any] = dict(impl=case.impl)
    if case.upstream == "weights":
        options["token_weights"] = x.token_weights
    if not case.kept:
        options["grad_bytes"] = 0
    if case.transforms:
        options |= dict(bias=x.bias, softcap=30.0, temperature=0.7)
        if case.own_head and case.function != "log p(y)":
            options["teacher_bias"] = x.teacher_bias
    if case.mask == "device":
        options["mask"] = x.mask
    elif case.mask == "host":
        options["mask"] = torch.empty(case.shape[0], dtype=torch.bool, device="cpu")
    if case.sharded:
        v = case.shape[1]
        options["shard"] = VocabShard(stage.group, RANK * v, RANKS * v)
    if case.chunk_rows is not None:
        options["chunk_bytes"] = 8 * case.shape[1] * case.chunk_rows
    return options


def rehearse(case: Case, stage: Stage, architectures: tuple[int, ...] = (90,)) -> Report:
    """One call and its backward. Where the code asks which GPU it has, once for each."""
    asks = case.impl in ("fused", "auto")
    found = None
    for sms in [(sm,) for sm in architectures] if asks else [architectures]:
        report = _rehearse(case, stage, sms)
        if found is None:
            found = report
        else:
            found.problems += [p for p in report.problems if p not in found.problems]
    assert found is not None
    return found


def _rehearse(case: Case, stage: Stage, architectures: tuple[int, ...]) -> Report:
    stage.gpu.architectures = architectures
    recorder = Recorder()
    with FakeTensorMode():
        x = inputs(case)
        options = options_of(case, x, stage)
        recorder.note(vars(x).values())
        before = recorder.live_bytes()
        kept, gradients = 0, []
        with stage.recording(recorder), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with torch.no_grad() if case.upstream == "none" else nullcontext():
                    out = FUNCTIONS[case.function](x, options)
                kept = recorder.live_bytes() - before
                if case.upstream != "none":
                    root = out.loss if case.upstream == "weights" else out[0]
                    grad = x.upstream.expand(root.shape) if root.ndim else x.upstream[0]
                    recorder.backward = True
                    with torch.no_grad():
                        gradients = backward(root, grad)
            except Exception as error:  # what would stop the call on a GPU, too
                recorder.problem(f"raises {type(error).__name__}: {error}"[:500])
        stays = sum(g.numel() * g.element_size() for g in gradients)
        if recorder.largest > (most := largest_piece(case, x)):
            recorder.problem(f"a tensor of {recorder.largest:,} B, where {most:,} are the most")
    peak = recorder.peak - before - stays
    report = Report(case, recorder.events, recorder.problems, peak, kept)
    if _limited(case) and report.small_launches() > SMALL_LAUNCHES:
        recorder.problem(f"{report.small_launches()} small launches per chunk")
    return report


def _limited(case: Case) -> bool:
    """Whether a chunk may have but few small launches: not where torch selects the top K, merges
    what ranks exchange or does all the work."""
    return case.impl == "triton" and not case.sharded and not case.function.startswith("top K")


def largest_piece(case: Case, x: SimpleNamespace) -> int:
    """Bytes that no tensor of a call may exceed: logits of a chunk, G, a float32 dW, an input, the
    workspaces of torch's rows."""
    n, v, d = case.shape
    budget = 8 * v * case.chunk_rows if case.chunk_rows else tuning.CHUNK_BYTES["cuda"]
    length = -(-v // PADDED) * PADDED
    most = max(t.numel() * t.element_size() for t in vars(x).values() if t is not None)
    grad = n * length * getattr(torch, case.dtype).itemsize if case.kept else 0
    spaces = 4 * 4 * max(rows_torch.BLOCK_ELEMENTS, v) if case.impl == "torch" else 0
    pieces = budget * length // v, 8 * length, grad, 4 * v * d, most, 4 * n * d, spaces
    return allocated(max(pieces))


def table_cases() -> list[Case]:
    """What kernels/README.md tells of every function, at the size of Qwen3-8B."""
    every = itertools.product((True, False), FUNCTIONS, ("weights", "any"))
    alone = [Case(function=f, upstream=upstream, kept=kept) for kept, f, upstream in every]
    n, v, d = QWEN
    shard = (n, v // RANKS, d)
    return alone + [Case(function=f, sharded=True, shape=shard) for f in FUNCTIONS]


def quick_cases() -> list[Case]:
    """Every function and upstream gradient where G is kept, and some options once."""
    odd = Case(shape=(301, 5003, 250), chunk_rows=100)
    return [
        *(case for case in table_cases() if case.kept and not case.sharded),
        Case(kept=False),
        Case(shape=(301, 5008, 256), function="log p(y)", impl="auto", upstream="none"),
        replace(odd, mask="host", upstream="any"),
        replace(odd, mask="device", own_head=True, sharded=True),
    ]


FACTORS: dict[str, tuple] = dict(
    function=tuple(FUNCTIONS),
    shape=SHAPES,
    dtype=("bfloat16", "float16", "float32"),
    impl=("triton", "fused", "torch", "auto"),
    upstream=("weights", "any", "none"),
    kept=(True, False),
    mask=("none", "host", "device"),
    transforms=(False, True),
    own_head=(False, True),
    sharded=(False, True),
    frozen=("none", "weight", "hidden"),
    chunk_rows=(None, 100),
)
"""What the settings of a call may be."""


def covering_cases() -> list[Case]:
    """Every pair of settings occurs in one of them, of those that go together; not every triple."""
    missing = {
        frozenset(pair)
        for (a, xs), (b, ys) in itertools.combinations(FACTORS.items(), 2)
        for pair in itertools.product(((a, x) for x in xs), ((b, y) for y in ys))
        if _go_together(dict(pair))
    }
    cases = []
    while missing:
        chosen = dict(min(missing, key=lambda pair: sorted(map(str, pair))))
        for name in sorted(set(FACTORS) - set(chosen), key=lambda n: (-len(FACTORS[n]), n)):
            gains = {
                value: sum(frozenset({(name, value), other}) in missing for other in chosen.items())
                for value in FACTORS[name]
                if _go_together(chosen | {name: value})
            }
            chosen[name] = max(gains, key=lambda value: gains[value])
        cases.append(Case(**chosen))
        missing -= {frozenset(pair) for pair in itertools.combinations(chosen.items(), 2)}
    return cases


def _go_together(chosen: dict[str, Any]) -> bool:
    """Whether settings, of some or all factors, can occur in one call."""
    n, v, _ = chosen.get("shape", (0, 0, 0))
    if chosen.get("impl") == "torch" and n * v > FEW_LOGITS:
        return False
    if chosen.get("upstream") == "none" and chosen.get("frozen", "none") != "none":
        return False
    return not (chosen.get("own_head") and chosen.get("function") == "log p(y)")


@dataclass(frozen=True, kw_only=True)
class Settings(Output):
    """How much is rehearsed."""

    quick: bool = False
    """Each function at one size, where G is kept, and some options once."""
    sm: tuple[int, ...] | None = None
    """Architectures, by compute capability; by default all, and the quick set for 90."""

    @property
    def architectures(self) -> tuple[int, ...]:
        return self.sm or ((90,) if self.quick else tuple(SHARED_LIMIT))


def run(settings: Settings, stage: Stage) -> list[dict[str, Any]]:
    """Rehearse, print and write; the rows."""
    cases = quick_cases()
    if not settings.quick:
        cases += table_cases() + covering_cases()
    sms = settings.architectures
    rows = []
    for case in dict.fromkeys(cases):
        rows.append(rehearse(case, stage, sms).row())
        settings.keep(rows[-1:])  # as it comes
    _print(rows, settings)
    return rows


def _print(rows: list[dict[str, Any]], settings: Settings) -> None:
    console = Console(width=150)
    columns = "forward", "backward", "peak, MB", "small per chunk"
    table = grid(
        f"matmuls of N V D, memory beyond inputs and gradients; torch {torch.__version__}, "
        f"Triton {triton.__version__}, sm {' '.join(map(str, settings.architectures))}",
        *("call", *columns),
    )
    for r in rows:
        numbers = (f"{r['matmuls'][p]:.3g}" for p in ("forward", "backward"))
        table.add_row(
            r["case"], *numbers, f"{r['peak_bytes'] / 1e6:,.0f}", str(r["small_per_chunk"])
        )
    console.print(table)
    variants = {k for r in rows for k in r["kernels"]}
    console.print(f"{len(rows)} calls, {len(variants)} kernel variants")
    found: dict[str, list[str]] = defaultdict(list)
    for r in rows:
        for text in r["problems"]:
            found[text].append(r["case"])
    for text, cases in sorted(found.items(), key=lambda item: -len(item[1])):
        console.print(f"{text}\n    in {len(cases)} of {len(rows)} calls: {cases[0]}", markup=False)


if __name__ == "__main__":
    sys.exit(any(r["problems"] for r in run(tyro.cli(Settings, description=__doc__), Stage())))
