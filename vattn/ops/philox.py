"""Random bits that depend on a key and a counter only, the same on every device."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["philox_reference", "philox_words"]

_MASK = 0xFFFFFFFF


def philox_words(k0: Any, k1: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> tuple[Any, ...]:
    """Philox4x32-10: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.

    Key and counter are words of 32 bits in int64, as tensors or as numpy's arrays.
    """
    for _ in range(10):
        # A product may pass 2^63 and wrap; its 64 bits are right all the same.
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((second >> 32) & _MASK) ^ c1 ^ k0,
            second & _MASK,
            ((first >> 32) & _MASK) ^ c3 ^ k1,
            first & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def philox_reference(seed: torch.Tensor, *counter: torch.Tensor | int) -> tuple[torch.Tensor, ...]:
    """``philox_words`` as ``triton.language.philox`` has it.

    Args:
        seed: int64, the key: its low 32 bits, then its high ones.
        counter: four words of 32 bits, broadcast with the seed; of wider integers the low bits count.

    Returns:
        Four int64 tensors in ``[0, 2 ** 32)``.
    """
    words = (torch.as_tensor(word, device=seed.device).long() & _MASK for word in counter)
    return philox_words(seed & _MASK, (seed >> 32) & _MASK, *words)
