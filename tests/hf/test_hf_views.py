"""Views of a ``VirtualCache`` under other people's kernels: right behind their rows nothing is mapped."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

transformers = pytest.importorskip("transformers")
from vattn.hf import VirtualCache  # noqa: E402

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
    "matmul": None,
}
SHAPES = {  # layers, heads of K and V, head size, dtype, page; a page holds 4 and 16 tokens
    "cpu": (4, 2, 16, torch.float32, 4096),
    "cuda": (32, 8, 128, torch.bfloat16, None),
}


def attend(kernel, q, k, v, mask):
    group = q.shape[1] // k.shape[1]
    if kernel is not None:
        with sdpa_kernel([kernel]):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=group > 1)
    scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v.repeat_interleave(group, 1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_last_row_of_a_page_is_the_last_that_is_read(kernel, masked, device):
    """A fault would end the process."""
    layers, kv_heads, head_dim, dtype, page_bytes = SHAPES[device]
    config = transformers.LlamaConfig(
        num_hidden_layers=layers,
        num_attention_heads=2 * kv_heads,
        num_key_value_heads=kv_heads,
        hidden_size=2 * kv_heads * head_dim,
    )
    draw = torch.Generator(device).manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=draw, device=device, dtype=dtype)

    with VirtualCache(config, max_length=4096, page_bytes=page_bytes, attention=None) as past:
        k, v = (random(2, kv_heads, 1, head_dim) for _ in range(2))
        past.update(k, v, 0)
        tokens_per_page = int(past.kv_cache.layout.tokens_per_page(past.kv_cache.page_bytes))
        assert tokens_per_page * past.kv_cache.layout.bytes_per_token == past.kv_cache.page_bytes
        past.reset()
        for pages in (1, 2, 7, 8, 64):
            length = pages * tokens_per_page
            past.reset()
            k, v = (random(2, kv_heads, length, head_dim) for _ in range(2))
            for layer in (0, layers - 1):
                keys, values = past.update(k, v, layer)
                assert past.stats().in_use_bytes == 2 * pages * past.kv_cache.page_bytes
                for num_queries in (1, 5):
                    q = random(2, 2 * kv_heads, num_queries, head_dim)
                    mask = torch.rand(2, 1, num_queries, length, device=device) < 0.8 if masked else None
                    if mask is not None:
                        mask[..., 0] = True
                    try:
                        out = attend(KERNELS[kernel], q, keys, values, mask)
                    except RuntimeError as error:
                        if "No available kernel" not in str(error) and "No viable backend" not in str(error):
                            raise
                        pytest.skip("not for this device, dtype or mask")
                    exact = attend(None, q.double(), k.double(), v.double(), mask)
                    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
                    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
