"""What is chosen where: a table over machines, dtypes, head sizes, features and margins, on GPUs that are none."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from vattn import KVLayout, LayerGroup
from vattn.attention import LEFT_PADDING, SINKS, SOFTCAP, choose, flash_attn2, flash_attn3
from vattn.errors import ConfigError
from vattn.hf.backends import choose_backend
from vattn.hf.shapes import LayerShape
from vattn.tuning import decode_attention

# device, compute capability, which of the packages are installed
MACHINES = {
    "CPU": ("cpu", (0, 0), {"triton"}),
    "T4": ("cuda", (7, 5), {"triton", "flash-attn-2"}),
    "A100": ("cuda", (8, 0), {"triton", "flash-attn-2", "flash-attn-3"}),
    "H100": ("cuda", (9, 0), {"triton", "flash-attn-2", "flash-attn-3"}),
    "H100, torch and Triton": ("cuda", (9, 0), {"triton"}),
    "H100, torch alone": ("cuda", (9, 0), set()),
    "H100, without Triton": ("cuda", (9, 0), {"flash-attn-2", "flash-attn-3"}),
    "H100, without flash-attn": ("cuda", (9, 0), {"triton", "flash-attn-3"}),
}
HALF, FLOAT = torch.bfloat16, torch.float32


@pytest.fixture
def on(monkeypatch):
    """A function that makes this machine look like another."""
    find_spec = importlib.util.find_spec

    def pretend(machine):
        device, capability, installed = MACHINES[machine]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU that nobody measured")
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        for name, module in (("flash-attn-2", flash_attn2), ("flash-attn-3", flash_attn3)):
            monkeypatch.setattr(module, "_unavailable", lambda name=name: None if name in installed else "absent")
        monkeypatch.setattr(flash_attn3, "_build_flags", dict)
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest: find_spec(name, *rest) if name != "triton" or "triton" in installed else None,
        )
        return torch.device(device)

    return pretend


@pytest.mark.parametrize(
    ("machine", "dtype", "head_dim", "max_over_read", "features", "name"),
    [
        ("CPU", FLOAT, 128, None, (), "sdpa"),
        ("CPU", HALF, 60, 0, (LEFT_PADDING,), "sdpa"),
        ("CPU", FLOAT, 128, None, (SOFTCAP,), "reference"),
        ("CPU", FLOAT, 128, None, (LEFT_PADDING, SINKS), "reference"),
        ("T4", HALF, 128, None, (), "sdpa"),
        ("T4", HALF, 128, None, (SINKS,), "reference"),
        ("A100", HALF, 128, None, (), "flash-attn-2"),
        ("A100", FLOAT, 128, None, (), "sdpa"),
        ("A100", HALF, 60, None, (), "sdpa+triton-decode"),
        ("A100", HALF, 264, None, (), "sdpa"),
        ("A100", HALF, 512, None, (SOFTCAP,), "reference"),
        ("H100", HALF, 128, None, (), "flash-attn-3+flash-attn-2"),
        ("H100", torch.float16, 64, 191, (), "flash-attn-3+flash-attn-2"),
        ("H100", HALF, 128, 190, (), "flash-attn-2"),
        ("H100", HALF, 128, 0, (LEFT_PADDING, SOFTCAP, SINKS), "flash-attn-2"),
        ("H100", FLOAT, 128, None, (), "sdpa"),
        ("H100", torch.float64, 128, None, (), "sdpa"),
        ("H100, without flash-attn", HALF, 128, None, (), "flash-attn-3"),
        ("H100, without flash-attn", HALF, 128, 0, (), "torch-varlen+triton-decode"),
        ("H100, torch and Triton", HALF, 128, None, (), "torch-varlen+triton-decode"),
        ("H100, torch and Triton", HALF, 128, None, (SOFTCAP,), "reference+triton-decode"),
        ("H100, torch and Triton", FLOAT, 128, None, (), "sdpa"),
        ("H100, torch alone", HALF, 128, None, (LEFT_PADDING, SINKS), "torch-varlen"),
        ("H100, torch alone", HALF, 128, None, (SOFTCAP,), "reference"),
        ("H100, torch alone", HALF, 60, None, (), "sdpa"),
    ],
)
def test_for_both_phases(on, machine, dtype, head_dim, max_over_read, features, name):
    found = choose(on(machine), dtype, head_dim, max_over_read=max_over_read, features=frozenset(features))
    assert found.name == name


@pytest.mark.parametrize(
    ("machine", "dtype", "head_dims", "features", "name"),
    [
        ("CPU", FLOAT, (24, 16), (), "sdpa"),
        ("CPU", FLOAT, (24, 16), (SINKS,), "reference"),
        ("H100", HALF, (192, 128), (), "sdpa"),
        ("H100", HALF, (192, 128), (LEFT_PADDING,), "sdpa"),
        ("H100", HALF, (192, 128), (SOFTCAP,), "reference"),
        ("H100", HALF, (128, 128), (), "flash-attn-2"),
        ("H100, torch and Triton", HALF, (128, 128), (), "torch-varlen+triton-decode"),
    ],
)
def test_for_a_layer_of_transformers(on, machine, dtype, head_dims, features, name):
    """Whose K and V heads may differ in size, in a cache without a margin."""
    cache = SimpleNamespace(device=on(machine), layout=SimpleNamespace(dtype=dtype))
    storage = SimpleNamespace(kv_cache=cache, options=SimpleNamespace(attention="auto"))
    assert choose_backend(storage, LayerShape(8, *head_dims), frozenset(features)).name == name


ONE, UNLIKE, MIXED = [(128, 128)], [(192, 128)], [(128, 128), (64, 64)]  # K and V heads, by layer


@pytest.mark.parametrize(
    ("machine", "dtype", "head_dims", "margin", "name"),
    [
        ("CPU", FLOAT, ONE, 0, "sdpa"),
        ("CPU", FLOAT, UNLIKE, 0, "sdpa"),
        ("T4", HALF, ONE, 0, "needs a GPU of compute capability 8.0"),
        ("A100", HALF, ONE, 0, "triton-decode"),
        ("A100", FLOAT, ONE, 0, "triton-decode"),
        ("A100", HALF, UNLIKE, 0, "triton-decode"),
        ("H100", HALF, MIXED, 191, "triton-decode"),
        ("H100", HALF, [(264, 264)], 0, "expected a head_dim of at most 256, got 264"),
        ("H100", torch.float64, ONE, 0, "expected float16, bfloat16 or float32, got torch.float64"),
        ("H100, without Triton", HALF, ONE, 191, "flash-attn-3"),
        ("H100, without Triton", HALF, ONE, 190, "flash-attn-2"),
        ("H100, torch alone", HALF, ONE, 0, "torch-varlen"),
        ("H100, torch alone", HALF, UNLIKE, 0, "needs K and V heads of one size"),
        ("H100, torch alone", HALF, MIXED, 0, "needs K and V heads of one size"),
    ],
)
def test_for_captured_steps(on, machine, dtype, head_dims, margin, name):
    groups = [LayerGroup([i], 8, k, v) for i, (k, v) in enumerate(head_dims)]
    layout = KVLayout(groups=groups, max_seq_len=64, dtype=dtype)
    cache = SimpleNamespace(device=on(machine), layout=layout, over_read_tokens=margin, over_read_masked=False)
    if " " in name:
        with pytest.raises(ConfigError, match=name):
            decode_attention(cache, 32, 1, 64)
    else:
        assert decode_attention(cache, 32, 1, 64).name == name
