"""Sizes of models whose weights the benchmarks draw at random or do not need."""


def _qwen3(hidden: int, inter: int, layers: int, heads: int, tied: bool, **other: int) -> dict:
    common = dict(vocab_size=151_936, head_dim=128, num_key_value_heads=8)
    common |= dict(max_position_embeddings=40_960)
    sizes = dict(hidden_size=hidden, intermediate_size=inter, num_hidden_layers=layers)
    return common | sizes | dict(num_attention_heads=heads, tie_word_embeddings=tied) | other


QWEN3 = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, True),
    "qwen3-8b": _qwen3(4096, 12_288, 36, 32, False),
    "qwen3-32b": _qwen3(5120, 25_600, 64, 64, False),
}
"""Fields of config.json, as the published models have them."""
TINY = {
    "tiny": _qwen3(256, 768, 4, 4, False, vocab_size=32_000, head_dim=64, num_key_value_heads=2),
    "check": _qwen3(64, 128, 2, 4, False, vocab_size=512, head_dim=16, num_key_value_heads=2),
    "count": _qwen3(64, 192, 3, 4, False, vocab_size=768, head_dim=32, num_key_value_heads=2),
}
"""For a CPU: to time, to check gradients, to count collectives."""
