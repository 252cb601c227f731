"""Decode steps of equally long sequences in two launches a layer, repeated past Triton's front end."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")

from vattn.attention import AttentionBatch, get
from vattn.attention.uniform_step import StepState, UniformStep
from vattn.ops.relaunch import Relaunch

NAN = float("nan")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
ROWS = 700


def views(batch, kv_heads, head_dim, v_head_dim, dtype, device, rows=ROWS, layers=1):
    """K and V of layers side by side, token after token, all NaN."""
    memory = torch.full((batch, rows, layers, kv_heads * (head_dim + v_head_dim)), NAN, dtype=dtype, device=device)
    pairs = []
    for layer in range(layers):
        k, v = memory[:, :, layer].split((kv_heads * head_dim, kv_heads * v_head_dim), dim=-1)
        pairs.append((k.unflatten(-1, (kv_heads, head_dim)), v.unflatten(-1, (kv_heads, v_head_dim))))
    return pairs


def token(batch, heads, head_dim, dtype, device, transposed=True):
    """As a projection leaves a token, or as a rotary embedding does."""
    if transposed:
        return torch.randn(batch, 1, heads, head_dim, device=device).to(dtype).transpose(1, 2)
    return torch.randn(batch, heads, 1, head_dim, device=device).to(dtype)


def expected(q, k, v, end, *, scale=None, starts=None, window=None, softcap=None, sinks=None):
    """In float64, with what must not be read taken away."""
    batch = q.shape[0]
    starts = (0,) * batch if starts is None else starts
    lengths = [end - start for start in starts]
    rows = AttentionBatch(tuple(range(batch)), (1,) * batch, tuple(lengths), torch.device("cpu"), starts)
    options = {"window": window, "scale": q.shape[3] ** -0.5 if scale is None else scale, "softcap": softcap}
    if sinks is not None:
        options["sinks"] = sinks.cpu().double()
    q, k, v = (x.cpu().double().nan_to_num(0.0) for x in (q.squeeze(2), k, v))
    return get("reference")(q, k, v, rows, **options).unsqueeze(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "v_head_dim"), [(4, 2, 64, 64), (12, 3, 80, 80), (7, 1, 40, 40), (6, 2, 24, 16)]
)
def test_against_float64(heads, kv_heads, head_dim, v_head_dim, dtype, device):
    """Step by step, with NaN in every row to come: around tiles, from one split to several."""
    torch.manual_seed(heads)
    for batch, first in ((1, 1), (3, 62), (2, 126), (1, 690)):
        ((k, v),) = views(batch, kv_heads, head_dim, v_head_dim, dtype, device)
        k[:, : first - 1].normal_()
        v[:, : first - 1].normal_()
        step = UniformStep(StepState(batch, ROWS, k.device), k, v)
        for end in range(first, first + 5):
            new_k = token(batch, kv_heads, head_dim, dtype, device, transposed=end % 2)
            new_v = token(batch, kv_heads, v_head_dim, dtype, device)
            q = token(batch, heads, head_dim, dtype, device, transposed=end % 3)
            scale = None if end % 2 else 0.3
            if end % 5:
                step.append(new_k, new_v, end)
                out = step.attend(q, end, scale=scale)
            else:
                k[:, end - 1], v[:, end - 1] = new_k.squeeze(2), new_v.squeeze(2)
                out = step.attend(q, end, scale=scale)
            assert torch.equal(k[:, end - 1], new_k.squeeze(2))
            assert torch.equal(v[:, end - 1], new_v.squeeze(2))
            assert k[:, end:].isnan().all()
            assert v[:, end:].isnan().all()
            assert (out.dtype, out.shape) == (dtype, (batch, 1, heads, v_head_dim))
            right = expected(q, k, v, end, scale=scale)
            torch.testing.assert_close(out.cpu().double(), right, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("appended", [True, False])
@pytest.mark.parametrize("starts", [None, (0, 5, 99)])
@pytest.mark.parametrize("features", [{}, {"window": 70}, {"softcap": 3.0}, {"sinks": True}])
def test_features(features, starts, appended, device):
    """NaN before each sequence's first row, and before its window."""
    torch.manual_seed(3)
    ((k, v),) = views(3, 2, 64, 64, torch.float32, device)
    step = UniformStep(StepState(3, ROWS, k.device), k, v)
    features = dict(features)
    if "sinks" in features:
        features["sinks"] = torch.randn(8, device=device)
    for end in (140, 141, 142, 600):
        k.fill_(NAN)
        v.fill_(NAN)
        for sequence in range(3):
            first = max(starts[sequence] if starts else 0, end - features.get("window", end))
            k[sequence, first:end].normal_()
            v[sequence, first:end].normal_()
        q = token(3, 8, 64, torch.float32, device)
        new = tuple(x[:, end - 1 : end].transpose(1, 2).clone() for x in (k, v))
        if appended:
            k[:, end - 1], v[:, end - 1] = NAN, NAN
            step.append(*new, end)
        out = step.attend(q, end, starts=starts, **features)
        assert torch.equal(k[:, end - 1], new[0].squeeze(2))
        assert torch.equal(v[:, end - 1], new[1].squeeze(2))
        right = expected(q, k, v, end, starts=starts, **features)
        torch.testing.assert_close(out.cpu().double(), right, rtol=1e-5, atol=1e-5)


def test_pointers_of_any_alignment(device):
    """What was compiled for multiples of 16 bytes is not launched with others."""
    ((k, v),) = views(2, 2, 64, 64, torch.bfloat16, device)
    step = UniformStep(StepState(2, ROWS, k.device), k, v)
    memory = torch.randn(16 + 2 * 4 * 64, device=device).bfloat16()
    for row, (q_offset, k_offset, v_offset) in enumerate(((0, 0, 0), (1, 0, 0), (0, 3, 0), (0, 0, 5), (8, 8, 8))):
        q = memory[q_offset : q_offset + 512].view(2, 4, 1, 64)
        new_k = memory[k_offset : k_offset + 256].view(2, 2, 1, 64)
        new_v = memory[v_offset : v_offset + 256].view(2, 2, 1, 64)
        step.append(new_k, new_v, row + 1)
        out = step.attend(q, row + 1)
        assert torch.equal(k[:, row], new_k.squeeze(2))
        assert torch.equal(v[:, row], new_v.squeeze(2))
        torch.testing.assert_close(out.cpu().double(), expected(q, k, v, row + 1), rtol=1.6e-2, atol=1.6e-2)


def test_layers_share_what_a_launch_leaves_behind(device):
    """Layers of other shapes one after another, in and out of inference mode, and steps back."""
    torch.manual_seed(5)
    state = StepState(2, ROWS, torch.empty(0, device=device).device)
    layers = [
        pair
        for kv_heads, head_dim in ((2, 64), (4, 32))
        for pair in views(2, kv_heads, head_dim, head_dim, torch.float32, device, layers=2)
    ]
    steps = [UniformStep(state, k, v) for k, v in layers]
    for k, v in layers:
        k[:, :300].normal_()
        v[:, :300].normal_()
    for end, inference in ((200, True), (201, False), (202, True), (100, False), (300, True), (300, False)):
        with torch.inference_mode(inference):
            outs = [token(2, 8, k.shape[3], torch.float32, device) for k, _ in layers]
            for (k, v), step, q in zip(layers, steps, outs, strict=True):
                out = step.attend(q, end)
                torch.testing.assert_close(out.cpu().double(), expected(q, k, v, end), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_launchers_that_take_other_arguments(device, monkeypatch):
    """As in another release of Triton: every launch goes through the front end."""
    if device != "cuda":
        pytest.skip("the interpreter compiles nothing")
    ((k, v),) = views(1, 2, 64, 64, torch.bfloat16, device)
    step = UniformStep(StepState(1, ROWS, k.device), k, v)
    q = token(1, 4, 64, torch.bfloat16, device)
    rows = [torch.randn(1, 2, 1, 64, device=device).bfloat16() for _ in range(5)]

    def check(row):
        step.append(rows[row], rows[row + 1], row + 1)
        out = step.attend(q, row + 1)
        torch.testing.assert_close(out.cpu().double(), expected(q, k, v, row + 1), rtol=1.6e-2, atol=1.6e-2)

    check(0)
    launch = step._launch
    assert launch._run is not None
    check(1)  # the compiled kernel's
    launch._values.append(7)
    check(2)
    assert launch._run is None
    check(3)
    assert step._launch is launch
    assert launch._run is None
    assert torch.equal(k[:, :4], torch.cat(rows[:4], 2).transpose(1, 2))


@pytest.mark.gpu
def test_on_other_streams(device):
    if device != "cuda":
        pytest.skip("needs streams")
    torch.manual_seed(7)
    ((k, v),) = views(2, 2, 64, 64, torch.bfloat16, device)
    k[:, :400].normal_()
    v[:, :400].normal_()
    step = UniformStep(StepState(2, ROWS, k.device), k, v)
    q = token(2, 8, 64, torch.bfloat16, device)
    for end in (200, 201, 202, 40):
        with torch.cuda.stream(torch.cuda.Stream()):
            out = step.attend(q, end, starts=(0, end % 3))
            torch.cuda.synchronize()
        right = expected(q, k, v, end, starts=(0, end % 3))
        torch.testing.assert_close(out.cpu().double(), right, rtol=1.6e-2, atol=1.6e-2)


class Compiled:
    """What Triton's front end returns, noting what it is launched with."""

    function, packed_metadata = 11, "metadata"

    def __init__(self):
        self.launched = []

    def run(self, *arguments):
        if len(arguments) != 13:
            raise TypeError("13 arguments")
        self.launched.append(arguments)


class Kernel:
    """A ``triton.jit`` function of four arguments, noting what it is launched with."""

    arg_names = ("scale", "x_ptr", "BLOCK", "out_ptr")

    def __init__(self):
        self.compiled, self.launched = Compiled(), []

    def __getitem__(self, grid):
        def launch(**arguments):
            self.launched.append((grid, arguments))
            return self.compiled

        return launch


def test_what_a_repeated_launch_is_made_of(monkeypatch):
    """On a device that is none: the order of arguments, pointers as numbers, and when the front end is asked again."""
    for name, found in (("_cuda_getDevice", 3), ("_cuda_getCurrentRawStream", 77)):
        monkeypatch.setattr(torch._C, name, lambda *_, found=found: found, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    kernel = Kernel()
    launch = Relaunch(
        kernel, {"scale": 0.5, "BLOCK": 64}, ("x_ptr", "out_ptr"), torch.device("cuda", 3), {"num_warps": 2}
    )
    x, out, other = (torch.zeros(32) for _ in range(3))
    launch((1, 2, 3), x, out)
    assert kernel.launched == [((1, 2, 3), {"scale": 0.5, "BLOCK": 64, "x_ptr": x, "out_ptr": out, "num_warps": 2})]
    launch((4, 5, 6), other, out)
    arguments = (4, 5, 6, 77, 11, "metadata", None, None, None, 0.5, other.data_ptr(), 64, out.data_ptr())
    assert kernel.compiled.launched == [arguments]
    launch((1, 1, 1), x[1:], out)  # no multiple of 16
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0)
    launch((1, 1, 1), x, out)  # another device is current
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 3)
    assert (len(kernel.launched), len(kernel.compiled.launched)) == (3, 1)
    launch((1, 1, 1), x, out)
    assert (len(kernel.launched), len(kernel.compiled.launched)) == (3, 2)
    launch._values.append("one too many")
    for count in (4, 5):
        launch((1, 1, 1), x, out)
        assert (len(kernel.launched), len(kernel.compiled.launched)) == (count, 2)
