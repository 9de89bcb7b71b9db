"""A language that tiny models learn in seconds."""

import torch

VOCABULARY = 60


def markov_text(rows: int, length: int, seed: int) -> torch.Tensor:
    """(rows, length) tokens of one order-2 source: the same language for every seed, other text."""
    language = torch.Generator().manual_seed(7)
    before, last, out = (torch.randn(size, generator=language) for size in ((60, 6), (60, 6), (6, VOCABULARY)))
    table = (1.5 * (before[:, None] * 0.7 + last[None]) @ out).softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    for t in range(2, length):
        text[:, t] = torch.multinomial(table[text[:, t - 2], text[:, t - 1]], 1, generator=generator)[:, 0]
    return text
