"""The lm_head that the objectives read, on a process group of one."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from helpers import runs
from sdpo_parallel.torchtitan.lm_head import gathered, hold
from sdpo_parallel.torchtitan.mesh import init_distributed

V, D = 12, 4


@pytest.fixture
def group():
    with runs.as_alone():
        init_distributed()
        yield torch.distributed.group.WORLD
        torch.distributed.destroy_process_group()


def test_a_plain_head_is_its_weight():
    head = torch.nn.Linear(D, V, bias=False)
    found = gathered(head, V, None)
    assert found.weight is head.weight and found.shard is None


class Decoder(torch.nn.Module):
    """Sharded as torchtitan's decoders are: norm and lm_head are one group."""

    def __init__(self):
        super().__init__()
        self.body, self.norm = torch.nn.Linear(D, D), torch.nn.Linear(D, D)
        self.lm_head = torch.nn.Linear(D, V, bias=False)
        fully_shard([self.norm, self.lm_head], reshard_after_forward=False)
        fully_shard(self)

    def forward(self, x):
        return self.norm(self.body(x))


def test_a_sharded_head_is_gathered_held_and_its_gradient_finds_the_parameter(group):
    model = Decoder()
    head = model.lm_head
    assert isinstance(head.weight, DTensor)
    whole, x = head.weight.full_tensor().detach().clone(), torch.randn(5, D)
    expected = torch.zeros_like(whole)
    for last in (False, True):
        hidden = model(x)
        found = gathered(head, V, None).weight
        assert not isinstance(found, DTensor) and torch.equal(found, whole)
        hold(head, until_last=not last)
        (hidden @ found.T).sum().backward()
        expected += hidden.detach().sum(0)
        assert isinstance(head.weight, DTensor) == last, "gathered until the step's last backward"
    assert isinstance(head.weight.grad, DTensor)
    torch.testing.assert_close(head.weight.grad.full_tensor(), expected)


def test_a_tensor_parallel_head_says_which_rows_it_holds(group):
    head = torch.nn.Linear(D, V, bias=False)
    found = gathered(head, V, group)
    assert found.shard is not None and found.weight.shape == (V, D)
