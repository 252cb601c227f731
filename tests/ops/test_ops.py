"""Fused ops against their eager references: odd shapes, every dtype; on the CPU through Triton's interpreter."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import sys

import pytest
import torch

import vattn
import vattn.ops.rope_append as rope_module
from vattn.errors import ConfigError
from vattn.ops.add_rms_norm import add_rms_norm, add_rms_norm_reference
from vattn.ops.rope_append import rope_append, rope_append_reference, rope_table
from vattn.ops.swiglu import swiglu, swiglu_reference
from vattn.ops.triton_support import unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Results are rounded once in both; where float32 arithmetic differs in its last bit, a rounding may fall the other way.
# The interpreter cuts to bfloat16 where a GPU rounds to nearest: an ulp more, twice where a stored value is read again.
INTERPRETED = not torch.cuda.is_available()
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 2.4e-2 if INTERPRETED else 8e-3}


@pytest.fixture
def draw(device):
    generator = torch.Generator().manual_seed(torch.randint(1 << 30, ()).item())

    def random(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return random


def close(one, other):
    tolerance = TOLERANCE[one.dtype]
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 64), (3, 100), (5, 2048), (2, 4096), (7, 576)])
@pytest.mark.parametrize("with_x", [True, False])
def test_add_rms_norm(draw, dtype, tokens, hidden, with_x):
    weight = draw(hidden, dtype=dtype)
    # Rows of a wider tensor: what lies between them must neither be read nor written.
    wide = draw(tokens, hidden + 7, dtype=dtype) * 3
    wide[:, hidden:] = float("nan")
    residual, expected_residual = wide[:, :hidden], wide[:, :hidden].clone()
    x = draw(tokens, hidden, dtype=dtype) if with_x else None
    expected = add_rms_norm_reference(x, expected_residual, weight, 1e-5)
    close(add_rms_norm(x, residual, weight, 1e-5), expected)
    if dtype == torch.bfloat16 and INTERPRETED:
        close(residual, expected_residual)
    else:
        assert torch.equal(residual, expected_residual)
    assert wide[:, hidden:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [None, 3])
@pytest.mark.parametrize("x_norm", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_add_rms_norm_of_other_layers(draw, dtype, splits, x_norm, norm):
    """With a norm of what is added, weights less one, a sum elsewhere, and no norm after it."""
    tokens, hidden = 3, 100
    residual, total = draw(tokens, hidden, dtype=dtype), torch.full((tokens, hidden + 5), float("nan"))
    kept, total = residual.clone(), total.to(residual)
    x = draw(tokens, hidden, dtype=dtype) if splits is None else draw(splits, tokens, hidden)
    x_weight, weight = (draw(hidden, dtype=dtype) if wanted else None for wanted in (x_norm, norm))
    got = add_rms_norm(x, residual, weight, 1e-2, 1.0, x_weight, total[:, :hidden])
    expected_total = torch.empty_like(residual)
    expected = add_rms_norm_reference(x, residual, weight, 1e-2, 1.0, x_weight, expected_total)
    close(got, expected)
    close(total[:, :hidden], expected_total)
    assert total[:, hidden:].isnan().all()
    assert torch.equal(residual, kept)
    # And the formula by torch's own norm.
    added = x.double() if splits is None else x.double().sum(0)
    if x_norm:
        added = torch.nn.functional.rms_norm(added, (hidden,), 1 + x_weight.double(), 1e-2)
    wide = residual.double() + added
    close(expected_total, wide.to(dtype))
    if norm:
        formula = torch.nn.functional.rms_norm(expected_total.double(), (hidden,), 1 + weight.double(), 1e-2)
        close(expected, formula.to(dtype))


def test_add_rms_norm_is_the_formula():
    x, residual, weight = (torch.randn(4, 32, dtype=torch.float64) for _ in range(3))
    total = x + residual
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight[0]
    torch.testing.assert_close(add_rms_norm_reference(x, residual, weight[0], 1e-5), expected)
    assert torch.equal(residual, total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size"), [(1, 64), (3, 1000), (2, 1536), (5, 33)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_swiglu(draw, dtype, tokens, size, activation):
    gate_up = draw(tokens, 2 * size, dtype=dtype) * 4
    gate_up[0, 0], gate_up[0, 1] = 80, -80  # exp of either must do no harm
    close(swiglu(gate_up, activation=activation), swiglu_reference(gate_up, activation=activation))
    gate, up = gate_up.double().chunk(2, -1)
    tanh = 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    formula = gate * (torch.sigmoid(gate) if activation == "silu" else tanh) * up
    got = swiglu_reference(gate_up.double(), activation=activation)
    torch.testing.assert_close(got, formula, rtol=1e-12, atol=1e-12)


def test_another_activation_is_refused():
    for function in (swiglu, swiglu_reference):
        with pytest.raises(ConfigError, match="one of silu, gelu_tanh, got 'relu'"):
            function(torch.ones(1, 8), activation="relu")


def open_cache(device, dtype, kv_heads, head_dim, order="token"):
    layout = vattn.KVLayout(3, kv_heads, head_dim, 700, dtype, order)
    return vattn.KVCache(layout, 5, device, memory_limit=1 << 28)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["token", "layer"])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "many"),
    [
        (4, 2, 64, False),
        (3, 3, 80, False),
        (8, 1, 128, False),
        (9, 3, 48, False),
        (9, 3, 48, True),
        (0, 3, 80, True),  # the last layer of a prefill
    ],
)
def test_rope_append(draw, device, dtype, order, norms, heads, kv_heads, head_dim, many, monkeypatch):
    """One head to a program, as for few tokens, and several."""
    monkeypatch.setattr(rope_module, "_MANY_TOKENS", 1 if many else 10**9)
    with open_cache(device, dtype, kv_heads, head_dim, order) as cache:
        slots = [cache.acquire() for _ in range(5)]
        cache.ensure_batch(slots, [700, 3, 33, 1, 699])
        slot = torch.tensor([4, 0, 2, 4, 1], device=device, dtype=torch.int32)
        row = torch.tensor([698, 699, 0, 697, 2], device=device, dtype=torch.int32)
        table = rope_table(10000.0 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim), 700)
        qkv = draw(5, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
        q_norm, k_norm = (draw(head_dim, dtype=dtype) for _ in range(2)) if norms else (None, None)
        k, v = cache.k(1), cache.v(1)
        # Poison: nothing but the five rows may change.
        for each in slots:
            for layer in range(3):
                for rows in cache.rows(each, layer):
                    rows.fill_(7)
        expected_k, expected_v = (torch.full((5, 700, kv_heads, head_dim), 7.0).to(device, dtype) for _ in range(2))
        expected = rope_append_reference(qkv, table, slot, row, expected_k, expected_v, q_norm, k_norm)
        close(rope_append(qkv, table, slot, row, k, v, q_norm, k_norm), expected)
        for each in slots:
            length = cache.seq_len(each)
            close(k[each, :length], expected_k[each, :length])
            assert torch.equal(v[each, :length], expected_v[each, :length])
            for layer in (0, 2):
                assert all((rows == 7).all() for rows in cache.rows(each, layer))
        cache.check_integrity()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim", "many"), [(64, 64, False), (80, 32, False), (24, 6, True)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_append_with_angles_of_each_token(
    draw, device, dtype, norms, head_dim, rotary_dim, many, interleaved, monkeypatch
):
    """For a part of the dimensions perhaps, with norms whose weights lack one."""
    monkeypatch.setattr(rope_module, "_MANY_TOKENS", 1 if many else 10**9)
    slots, rows = torch.tensor([[1, 0, 1], [5, 6, 0]], device=device)
    qkv = draw(2, 3, 7 * head_dim)  # two partial sums of three tokens
    half = rotary_dim // 2
    angles = draw(3, half)
    cos, sin = (each.to(dtype) for each in (angles.cos(), angles.sin()))
    # Views of what transformers has: each angle twice, one half after the other or side by side.
    table = (cos.repeat(1, 2)[:, :half], sin.repeat(1, 2)[:, :half])
    if interleaved:
        table = (cos.repeat_interleave(2, 1)[:, ::2], sin.repeat_interleave(2, 1)[:, ::2])
    norm = [draw(head_dim, dtype=dtype) if norms else None for _ in range(2)]
    caches = [torch.full((2, 8, 2, head_dim), 7.0).to(device, dtype) for _ in range(4)]
    got = rope_append(qkv, table, slots, rows, *caches[:2], *norm, 1e-5, 1.0, interleaved)
    expected = rope_append_reference(qkv, table, slots, rows, *caches[2:], *norm, 1e-5, 1.0, interleaved)
    close(got, expected)
    for one, other in zip(caches[:2], caches[2:], strict=True):
        close(one, other)
        assert (one == 7).all(-1).all(-1).sum() == 13
    # As transformers computes it.
    wide = qkv.double().sum(0).view(3, 7, head_dim)[:, :3]
    if norms:
        wide = torch.nn.functional.rms_norm(wide, (head_dim,), 1 + norm[0].double(), 1e-5)
    turned, rest = wide.split((rotary_dim, head_dim - rotary_dim), -1)
    cos, sin = ((each.repeat_interleave(2, 1) if interleaved else each.repeat(1, 2)) for each in (cos, sin))
    other = torch.cat((-turned[..., half:], turned[..., :half]), -1)
    if interleaved:
        other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    turned = turned * cos.double()[:, None] + other * sin.double()[:, None]
    close(expected, torch.cat((turned, rest), -1).to(dtype))


@pytest.mark.parametrize("shape", [(2, 9), (3, 8), (2, 1, 8)])
def test_angles_that_do_not_fit_are_refused(shape):
    slots, rows = torch.zeros(2, 2, dtype=torch.int64)
    k, v = torch.zeros(2, 1, 4, 1, 16)
    for function in (rope_append, rope_append_reference):
        with pytest.raises(ConfigError, match=r"cosines and sines \[2, at most 8\]"):
            function(torch.ones(2, 48), (torch.ones(shape), torch.ones(shape)), slots, rows, k, v)
        with pytest.raises(ConfigError, match=r"of torch\.complex64"):
            function(torch.ones(2, 48), (torch.ones(2, 8).to(torch.complex64),) * 2, slots, rows, k, v)


def test_rope_is_a_rotation_by_the_position():
    """Against complex numbers, in float64, up to positions that bfloat16 could not tell apart."""
    frequencies = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    table = rope_table(frequencies, 5000)
    qkv = torch.randn(3, 4 * 16, dtype=torch.float64)
    rows = torch.tensor([0, 257, 4999])
    k, v = torch.zeros(2, 1, 5000, 1, 16, dtype=torch.float64)
    q = rope_append_reference(qkv, table, torch.zeros(3), rows, k, v)
    turns = torch.polar(torch.ones(()).double(), rows[:, None].double() * frequencies.double())[:, None]
    heads = qkv.view(3, 4, 16)
    expected = torch.complex(heads[..., :8], heads[..., 8:]) * turns
    torch.testing.assert_close(torch.complex(q[..., :8], q[..., 8:]), expected[:, :2], rtol=0, atol=2e-3)
    torch.testing.assert_close(torch.complex(*k[0, rows, 0].chunk(2, -1)), expected[:, 2], rtol=0, atol=2e-3)
    assert torch.equal(v[0, rows, 0], heads[:, 3])


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """The last slot of a cache of 2^34 elements."""
    device = "cuda"
    layout = vattn.KVLayout(32, 8, 128, 131072, torch.bfloat16)
    with vattn.KVCache(layout, 2, device, memory_limit=1 << 28) as cache:
        cache.acquire(1)
        cache.ensure(1, 16)
        k, v = cache.k(31), cache.v(31)
        assert k.stride(0) > 2**31
        qkv = torch.randn(1, 48 * 128, device=device, dtype=torch.bfloat16)
        table = rope_table(torch.ones(64, device=device), 16)
        slot, row = torch.tensor([1], device=device), torch.tensor([15], device=device)
        rope_append(qkv, table, slot, row, k, v)
        assert torch.equal(v[1, 15].flatten(), qkv[0, 40 * 128 :])


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory of the interpreter's")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="MAP_32BIT is a flag of x86-64")
def test_addresses_of_less_than_32_bits():
    """A kernel gets a small number as a 32-bit one, an address too."""
    low = mmap.mmap(-1, 1 << 16, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40)
    k, v = torch.frombuffer(low, dtype=torch.float32).view(2, 4, 64, 2, 16)
    assert 0 < k.data_ptr() < 2**31
    qkv, table = torch.randn(3, 8 * 16), rope_table(torch.ones(8), 64)
    slots, rows = torch.tensor([1, 0, 3]), torch.tensor([5, 0, 63])
    rope_append(qkv, table, slots, rows, k, v)
    expected_k, expected_v = torch.zeros_like(k), torch.zeros_like(v)
    rope_append_reference(qkv, table, slots, rows, expected_k, expected_v)
    torch.testing.assert_close(k, expected_k)
    assert torch.equal(v, expected_v)


def test_without_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match="need CUDA tensors"):
        swiglu(torch.ones(1, 8))


_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # an import of it fails, as if it were not installed
import torch, vattn.attention, vattn.engine, vattn.models
from vattn.errors import ConfigError
from vattn.ops.ops_table import fused_ops, reference_ops
gate_up = torch.ones(1, 8)
print(reference_ops().linear_swiglu(torch.ones(1, 4), torch.ones(8, 4)).shape)
ops = fused_ops()
for call in (ops.add_rms_norm, None, gate_up, gate_up[0], 1e-6), (ops.linear_swiglu, gate_up, torch.ones(8, 8)):
    try:
        call[0](*call[1:])
    except ConfigError as error:
        print(error)
"""


def test_without_triton_references_run_and_kernels_say_what_to_install():
    child = subprocess.run([sys.executable, "-c", _WITHOUT_TRITON], capture_output=True, text=True, timeout=120)
    wanted = "Triton is not installed: pip install triton (PyTorch's CUDA builds bring it)\n"
    assert (child.stdout, child.stderr) == ("torch.Size([1, 4])\n" + 2 * wanted, "")
