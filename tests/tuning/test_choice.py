"""What is chosen where: a table over machines, dtypes, head sizes, features and margins, on GPUs that are none."""

from __future__ import annotations

import pytest
import torch

from vattn import KVLayout, LayerGroup
from vattn.attention import LEFT_PADDING, SINKS, SOFTCAP, choose, flash_attn2, flash_attn3, triton_decode
from vattn.errors import ConfigError
from vattn.tuning import default_attention, default_decode

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

    def pretend(machine):
        device, capability, installed = MACHINES[machine]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU that nobody measured")
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        for name, module in (("flash-attn-2", flash_attn2), ("flash-attn-3", flash_attn3)):
            monkeypatch.setattr(module, "_unavailable", lambda name=name: None if name in installed else "absent")
        monkeypatch.setattr(flash_attn3, "_build_flags", dict)
        monkeypatch.setattr(triton_decode, "unavailable", lambda: None if "triton" in installed else "absent")
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
    head_dim, v_head_dim = head_dims
    options = {"max_over_read": 0, "features": frozenset(features)}
    assert choose(on(machine), dtype, head_dim, v_head_dim=v_head_dim, **options).name == name


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
    asked = (layout, on(machine), 1, 64, 32)
    if " " in name:
        with pytest.raises(ConfigError, match=name):
            default_decode(*asked, max_over_read=margin)
    else:
        assert default_decode(*asked, max_over_read=margin).name == name


@pytest.mark.parametrize("head_dims", [ONE, UNLIKE, MIXED])
def test_for_an_engine(on, head_dims):
    """Heads of several sizes have no measured order, and take what takes any."""
    groups = [LayerGroup([i], 8, k, v) for i, (k, v) in enumerate(head_dims)]
    layout = KVLayout(groups=groups, max_seq_len=64, dtype=HALF)
    name = "flash-attn-3+flash-attn-2" if head_dims == ONE else "sdpa"
    assert default_attention(layout, on("H100"), 32, max_over_read=191).name == name


@pytest.mark.parametrize(
    ("machine", "dtype", "name", "options", "reason"),
    [
        ("CPU", FLOAT, "flash-attn-2", {}, "needs an NVIDIA GPU, got device cpu"),
        ("T4", HALF, "torch-varlen", {}, "compute capability 8.0"),
        ("A100", HALF, "flash-attn-3", {}, "compute capability 9.0"),
        ("A100", FLOAT, "flash-attn-2", {}, "expected float16 or bfloat16, got torch.float32"),
        ("H100, torch alone", HALF, "flash-attn-2", {}, "absent"),
        ("H100", HALF, "flash-attn-3", {"max_over_read": 190}, "reads 191 rows past the end, 190 are allowed"),
        ("H100", HALF, "torch-varlen", {"v_head_dim": 64}, "needs K and V heads of one size, got 64 and 128"),
        ("H100", HALF, "torch-varlen", {"features": frozenset({SOFTCAP})}, "has no soft-capping"),
        ("H100", HALF, "triton-decode", {}, "computes one new token of each sequence and no prefill"),
    ],
)
def test_why_the_one_asked_for_is_refused(on, machine, dtype, name, options, reason):
    with pytest.raises(ConfigError, match=f"attention {name!r} cannot be used here: .*{reason}"):
        choose(on(machine), dtype, 128, name=name, **options)


def test_the_one_asked_for_is_not_changed_for_a_better(on):
    assert choose(on("H100"), HALF, 128, name="sdpa").name == "sdpa"
    assert choose(on("H100"), HALF, 128, name="flash-attn-3").name == "flash-attn-3"


def test_every_reason_is_given(on):
    with pytest.raises(ConfigError) as raised:
        choose(on("H100, torch alone"), HALF, 128, features=frozenset({"alibi"}))
    reasons = ("flash-attn-3: absent", "flash-attn-2: absent", "torch-varlen: has no alibi", "reference: has no alibi")
    assert all(reason in str(raised.value) for reason in reasons)
