"""One tensor-parallel rank: every function on its rows of the lm_head against the whole lm_head.

torchrun --nproc_per_node=2 tests/helpers/shard_worker.py
"""

import torch
import torch.distributed as dist

from helpers.cases import FUNCTIONS, evaluate, problem, statistics
from sdpo_kernels import VocabShard
from sdpo_kernels import vocab_parallel as vocab
from sdpo_kernels._impl import partials

TOKENS, WORDS, ROWS_PER_CHUNK = 13, 101, 5
CHUNKS = -(-TOKENS // ROWS_PER_CHUNK)
OPTIONS = dict(temperature=0.8, softcap=6.0)
K = 5
SENT = {
    "logprob": (partials.SINGLE, CHUNKS),
    "reverse_kl": (partials.PAIR + 1, CHUNKS + 1),  # and the values, once
    "forward_kl": (partials.PAIR + 1, CHUNKS + 1),
    "jsd": (partials.PAIR + 2, 2 * CHUNKS),
    "sampled_token": (partials.PAIR, CHUNKS),
    "topk": (partials.PAIR + K + 2 * K + partials.PAIR + 2 * K, 4 * CHUNKS),  # ids are int64
}
"""float32 numbers per token that a rank sends where weights are known up front, and collectives."""
sent: list[int] = []


def count_bytes() -> None:
    """Note the size of what every collective is given."""

    def counted(collective, position):
        def call(*args, **kwargs):
            x = args[position]
            sent.append(x.numel() * x.element_size())
            return collective(*args, **kwargs)

        return call

    vocab.dist.all_gather_into_tensor = counted(dist.all_gather_into_tensor, 1)
    vocab.dist.all_reduce = counted(dist.all_reduce, 0)


def splits(ranks: int) -> dict[str, list[int]]:
    """Borders of the ranks' shards."""
    even = [min(r * -(-WORDS // ranks), WORDS) for r in range(ranks + 1)]
    uneven = [0, *sorted([3, 90, 60][: ranks - 1]), WORDS]
    return {"even": even, "uneven": uneven, "empty": [0, *[WORDS] * ranks]}


def check(
    name: str, borders: list[int], impl: str, known: bool, dtype=torch.float32, **own
) -> None:
    """Values, statistics and gradients of the shards equal the whole's to 1e-5, in float32."""
    torch.manual_seed(0)
    p, bias = problem(TOKENS, WORDS, 16, 1.0, dtype), torch.randn(WORDS, dtype=dtype)
    p.targets[4] = -100
    chunk = ROWS_PER_CHUNK * WORDS * 4 * 2
    options = OPTIONS | own
    whole = evaluate(name, p, known=known, impl="torch", bias=bias, **options)
    rows = slice(*borders[dist.get_rank() :][:2])
    shard = VocabShard(dist.group.WORLD, rows.start, WORDS)
    mine = dict(shard=shard, impl=impl, chunk_bytes=chunk // dist.get_world_size())
    local = p._replace(weight=p.weight[rows])
    part = evaluate(name, local, known=known, bias=bias[rows], **mine, **options)
    dist.all_reduce(part["hidden"])  # partial
    expected = {**whole, "weight": whole["weight"][rows], "bias": whole["bias"][rows]}
    for k, t in part.items():
        close = 1e-5 if dtype == torch.float32 or k == "value" else 5e-2
        torch.testing.assert_close(t, expected[k], rtol=close, atol=close, msg=f"{name} {k}")
    found = statistics(name, local, bias=bias[rows], **mine, **options)
    truth = statistics(name, p, bias=bias, **options)
    for k, t in found.items():
        torch.testing.assert_close(t, truth[k], rtol=1e-5, atol=1e-5, msg=f"{name} {k}")


def check_bytes(name: str) -> None:
    p = problem(TOKENS, WORDS, 16, 1.0)
    shard = VocabShard.of(dist.group.WORLD, WORDS)
    local = p._replace(weight=p.weight[shard.rows])
    streams = 1 if name == "logprob" else 2
    chunk = ROWS_PER_CHUNK * 4 * streams * -(-WORDS // dist.get_world_size())
    sent.clear()
    evaluate(name, local, known=True, shard=shard, chunk_bytes=chunk)
    floats, collectives = SENT[name]
    assert sum(sent) == 4 * floats * TOKENS, (name, sum(sent) / TOKENS)
    assert len(sent) == collectives, (name, len(sent))
    if dist.get_rank() == 0:
        print(f"{name}: {sum(sent) / TOKENS:.0f} bytes per token")


def main() -> None:
    dist.init_process_group("gloo")
    count_bytes()
    for split, borders in splits(dist.get_world_size()).items():
        for name in FUNCTIONS:
            for known in (False, True):
                check(name, borders, "torch", known)
        for k in (1, WORDS):
            check("topk", borders, "torch", known=True, k=k)
        for name in ("logprob", "jsd", "topk") if split == "uneven" else ():
            check(name, borders, "triton", known=True)
        for impl in ("triton", "fused") if split == "empty" else ():
            check("sampled_token", borders, impl, known=True, dtype=torch.bfloat16)
    for name in SENT:
        check_bytes(name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
