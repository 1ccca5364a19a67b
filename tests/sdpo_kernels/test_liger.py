"""The drop-ins against Liger itself, and where Liger's own rounding would hide, float64."""

import functools
import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.oracle import MUTANTS, assert_as_good_as, rel_err
from sdpo_kernels import reference
from sdpo_kernels.liger import LigerFusedLinearJSD, LigerFusedLinearJSDLoss

N, V, H, H_TEACHER = 13, 97, 16, 24
BETAS = (0.0, 0.3, 0.5, 1.0)
LABELS = ("some", "none ignored", "all ignored")
BOTH = pytest.mark.parametrize("loss", [LigerFusedLinearJSD(), LigerFusedLinearJSDLoss()], ids=type)


def problem(dtype: torch.dtype = torch.float32, teacher_vocabulary: int = V) -> dict[str, Tensor]:
    """In the order of the arguments, but for the labels."""
    return {
        "student_input": torch.randn(N, H, dtype=dtype),
        "student_weight": torch.randn(V, H, dtype=dtype) * 0.7,
        "teacher_input": torch.randn(N, H_TEACHER, dtype=dtype),
        "teacher_weight": torch.randn(teacher_vocabulary, H_TEACHER, dtype=dtype) * 0.5,
        "student_bias": torch.randn(V, dtype=dtype),
        "teacher_bias": torch.randn(teacher_vocabulary, dtype=dtype),
    }


def labels(kind: str, ignore_index: int = -100) -> Tensor:
    ignored = {"some": torch.arange(N) % 3 == 1, "none ignored": torch.zeros(N).bool()}
    return torch.randint(V, (N,)).masked_fill(ignored.get(kind, torch.ones(N).bool()), ignore_index)


def evaluate(loss_of, x: dict[str, Tensor], y: Tensor | None, biased: bool) -> dict[str, Tensor]:
    """Every returned scalar, and every gradient of the student's of 3 times the first."""
    leaves = {k: t.clone().requires_grad_("student" in k) for k, t in x.items()}
    *streams, student_bias, teacher_bias = leaves.values()
    out = loss_of(*streams, y, *((student_bias, teacher_bias) if biased else ()))
    out = out if isinstance(out, tuple) else (out,)
    (3 * out[0]).backward()
    got = {f"loss {i}": t.detach() for i, t in enumerate(out)}
    return got | {k: t.grad for k, t in leaves.items() if t.grad is not None}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5):
    assert set(ours) == set(theirs)
    for k, t in theirs.items():
        assert ours[k].dtype == t.dtype
        if not t.any():
            assert not ours[k].any(), k
            continue
        assert rel_err(ours[k], t.double()) < tolerance, k
        for name, mutate in MUTANTS.items():
            if t.ndim:
                assert rel_err(mutate(t), t.double()) > tolerance, name


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", LABELS)
def test_chunked_loss_equals_ligers(kind, beta):
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    x, y = problem(), labels(kind)
    for hard, temperature, parts, biased in itertools.product(
        (0.0, 0.5), (1.0, 2.0), (False, True), (False, True)
    ):
        arguments = dict(
            weight_hard_loss=hard,
            weight_soft_loss=0.8,
            beta=beta,
            temperature=temperature,
            compiled=False,
            chunk_size=4,
            return_soft_hard_loss=parts,
        )
        theirs = evaluate(chunked_loss.LigerFusedLinearJSDLoss(**arguments), x, y, biased)
        ours = evaluate(LigerFusedLinearJSDLoss(**arguments), x, y, biased)
        assert len(ours) == 1 + 2 * parts + 2 + biased
        assert_equal(ours, theirs)


@pytest.mark.parametrize("biased", [False, True])
def test_chunked_loss_pads_a_smaller_students_logits_with_zeros_as_ligers(biased):
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    x, y = problem(teacher_vocabulary=V + 7), labels("some")
    arguments = dict(temperature=2.0, compiled=False)
    theirs = evaluate(chunked_loss.LigerFusedLinearJSDLoss(**arguments), x, y, biased)
    assert_equal(evaluate(LigerFusedLinearJSDLoss(**arguments), x, y, biased), theirs)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", [*LABELS, "no labels"])
def test_fused_loss_equals_ligers(kind, beta):
    """Liger's is a Triton kernel: interpreted, on the CPU."""
    theirs = pytest.importorskip("liger_kernel.transformers").LigerFusedLinearJSD
    if torch.cuda.is_available():
        pytest.skip("not interpreted where there is a GPU")
    x, y = problem(), None if kind == "no labels" else labels(kind)
    for temperature, accum_dtype in ((1.0, None), (2.0, torch.float32)):
        arguments = (beta, -100, temperature, accum_dtype)
        ours = evaluate(LigerFusedLinearJSD(*arguments), x, y, False)
        assert_equal(ours, evaluate(theirs(*arguments), x, y, False))


def oracle(
    x: dict[str, Tensor], y: Tensor, beta: float, temperature: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The definition: full logits, and the mean over the rows that count."""

    def loss(student, head, teacher, teacher_head, y):
        logp = reference.log_softmax(student, head, temperature=temperature)
        logq = reference.log_softmax(teacher, teacher_head, temperature=temperature)
        limits = {0.0: reference.forward_kl, 1.0: reference.reverse_kl}
        of_rows = limits.get(beta) or functools.partial(reference.jsd, beta=beta)
        return of_rows(logp, logq)[y != -1].mean()

    return evaluate(loss, {k: t.to(dtype) for k, t in x.items()}, y, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("beta", BETAS)
def test_both_are_as_good_as_float32_torch(beta, dtype):
    x, y = problem(dtype), labels("some", ignore_index=-1)
    truth, baseline = (oracle(x, y, beta, 2.0, d) for d in (torch.float64, torch.float32))
    for loss in (
        LigerFusedLinearJSD(beta, ignore_index=-1, temperature=2.0),
        LigerFusedLinearJSDLoss(0.0, 1.0, beta, ignore_index=-1, temperature=2.0),
    ):
        got = evaluate(loss, x, y, False)
        for k in truth:
            assert_as_good_as(*(torch.atleast_1d(t[k]) for t in (got, truth, baseline)))


@BOTH
def test_ignored_rows_may_hold_anything(loss):
    x, y = problem(), labels("some")
    clean = evaluate(loss, x, y, False)
    for k in ("student_input", "teacher_input"):
        x[k] = x[k].masked_fill((y == -100)[:, None], torch.nan)
    assert_equal(evaluate(loss, x, y, False), clean)


def test_ones_own_head_is_one_product_and_keeps_separate_biases_apart():
    x, y = problem(), labels("some")
    student, head, *_, bias, _ = x.values()
    teacher = torch.randn(N, H)
    for biases in ((), (bias, bias), (bias, None)):
        shared = LigerFusedLinearJSDLoss()(student, head, teacher, head, y, *biases)
        apart = LigerFusedLinearJSDLoss()(student, head, teacher, head.clone(), y, *biases)
        torch.testing.assert_close(shared, apart)


@BOTH
def test_autocast_computes_in_its_dtype(loss):
    x, y = problem(), labels("some")
    with torch.autocast("cpu", torch.bfloat16):
        got = evaluate(loss, x, y, False)
    rounded = evaluate(loss, {k: t.bfloat16() for k, t in x.items()}, y, False)
    assert got["student_input"].dtype == torch.float32
    for k, t in rounded.items():
        torch.testing.assert_close(got[k], t.float(), msg=k)


@BOTH
def test_no_shape_and_no_host_value_depends_on_the_labels(loss):
    """On a GPU, where either would wait for it: fake tensors have no values to ask for."""
    x, y = problem(), labels("some")
    with FakeTensorMode():
        given = (*list(x.values())[:4], y)
        on_gpu = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in given]
        out = loss(*(t.requires_grad_() for t in on_gpu[:4]), on_gpu[4])
        assert out.shape == () and out.requires_grad
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            out.item()


def test_mistakes_are_named():
    x, y = problem(), labels("some")
    streams = list(x.values())[:4]
    for loss in (LigerFusedLinearJSD(), LigerFusedLinearJSDLoss()):
        with pytest.raises(ValueError, match="labels must be"):
            loss(*streams, y[1:])
    with pytest.raises(ValueError, match="temperature must be positive"):
        LigerFusedLinearJSD(temperature=0.0)(*streams, y)
    with pytest.raises(ValueError, match="one vocabulary"):
        LigerFusedLinearJSDLoss()(*streams[:3], streams[3][1:], y)
