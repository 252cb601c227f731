"""Log-probabilities against float64, and their order where logits are equal."""

from __future__ import annotations

import pytest
import torch
from helpers.decode_ops import INF, NAN

from vattn.ops.logprobs import logprobs, logprobs_reference


def unpacked(bits, k):
    return bits[:, 0].view(torch.float32), bits[:, 1 : 1 + k].view(torch.float32), bits[:, 1 + k :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("k", [0, 1, 5, 20])
def test_against_float64(device, dtype, k):
    """bfloat16 of 700 tokens has many equal logits, among them 0 and -0; the lower ids come first."""
    logits = (torch.randn(9, 700) * torch.linspace(0.01, 8, 9)[:, None]).to(device, dtype)
    logits[3, ::2] = 0.0
    logits[3, ::4] = -0.0
    logits[4, ::3], logits[5, ::3], logits[6] = NAN, -INF, -2.5
    tokens = torch.randint(0, 700, (9,), dtype=torch.int32, device=device)
    tokens[8] = -1
    bits = logprobs(logits, tokens, k)
    assert bits.dtype == torch.int32
    assert bits.shape == (9, 1 + 2 * k)
    chosen, top, ids = unpacked(bits, k)
    expected, expected_top, expected_ids = logprobs_reference(logits, tokens, k)
    assert torch.allclose(chosen.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(top.double(), expected_top, rtol=1e-5, atol=1e-5)
    assert torch.equal(ids.long(), expected_ids)
    assert (top.diff(dim=-1) <= 0).all()
    assert torch.allclose(
        logprobs_reference(logits[:3], tokens[:3], 700)[1].exp().sum(-1), torch.ones(3, device=device).double()
    )


def test_reference_is_the_log_softmax():
    logits, tokens = torch.randn(4, 50), torch.arange(4)
    chosen, top, ids = logprobs_reference(logits, tokens, 7)
    expected = logits.double().log_softmax(-1)
    assert torch.allclose(chosen, expected[range(4), range(4)])
    wanted = expected.topk(7)
    assert torch.allclose(top, wanted.values)
    assert torch.equal(ids, wanted.indices)


def test_infinities(device):
    logits = torch.tensor([[INF, 0.0, INF, -INF], [-INF, -INF, NAN, NAN], [3e38, -3e38, NAN, 0.0]], device=device)
    chosen, top, ids = unpacked(logprobs(logits, torch.tensor([1, 0, 2], device=device), 2), 2)
    half = torch.tensor(0.5).log().item()
    assert ids.tolist() == [[0, 2], [0, 1], [0, 3]]
    assert top.tolist() == [[half, half], [half, half], [0.0, pytest.approx(-3e38)]]
    assert chosen.tolist() == [-INF, half, -INF]
