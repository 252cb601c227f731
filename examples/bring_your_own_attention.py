"""Bring your own attention kernel: declare how far it reads past the end, and plug it into the engine.

    python examples/bring_your_own_attention.py

The kernel here is written in PyTorch and runs anywhere. Like many fast ones it loads K and V in whole tiles, so it
reads rows past the end of a sequence. It says so, and the cache keeps those rows mapped and free of NaN.
"""

import torch
import torch.nn.functional as F

import vattn
from vattn.engine import Engine, Request
from vattn.models import Llama, LlamaConfig

TILE = 16


class TiledAttention:
    name = "tiled"
    over_read_tokens = TILE - 1  # a tile holds at least one row of the sequence
    features = frozenset()  # no left padding, soft-capping or sinks
    masks_over_read = False  # a probability of zero times a NaN in V would be a NaN

    def supports(self, device, dtype, head_dim):
        return None  # or the reason why not

    def __call__(self, q, k, v, batch, *, scale, window=None):
        """q ``[tokens, heads, dim]``, k and v ``[max_slots, max_seq_len, kv_heads, dim]`` -> as q."""
        out = torch.empty_like(q)
        for i, (slot, seq_len) in enumerate(zip(batch.slots, batch.seq_lens, strict=True)):
            new = slice(batch.query_starts[i], batch.query_starts[i + 1])
            last = -(-seq_len // TILE) * TILE  # max_seq_len is a multiple of the tile here
            row = torch.arange(last, device=q.device)
            query_row = torch.arange(seq_len - batch.query_lens[i], seq_len, device=q.device)[:, None]
            visible = row <= query_row if window is None else (row <= query_row) & (row > query_row - window)
            heads_first = [x.transpose(0, 1) for x in (q[new], k[slot, :last], v[slot, :last])]
            attended = F.scaled_dot_product_attention(*heads_first, attn_mask=visible, scale=scale, enable_gqa=True)
            out[new] = attended.transpose(0, 1)
        return out


def main():
    shape = LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=8
    )
    model = Llama.random(shape, std=0.3)
    requests = [Request([1, 2, 3, 4, 5], max_new_tokens=24), Request([7] * 100, max_new_tokens=24)]
    tiled = TiledAttention()
    with vattn.KVCache(
        model.kv_layout(max_seq_len=256),
        max_slots=2,
        device="cpu",
        memory_limit=2**26,
        over_read_tokens=tiled.over_read_tokens,
        over_read_masked=tiled.masks_over_read,
    ) as cache:
        mine = Engine(model, cache, tiled).generate(requests)
        built_in = Engine(model, cache).generate(requests)
    assert [completion.tokens for completion in mine] == [completion.tokens for completion in built_in]
    print(f"{sum(len(completion.tokens) for completion in mine)} tokens, the same as with the built-in attention")


if __name__ == "__main__":
    main()
