"""Replays that read their inputs where the caller has them: the same outputs as eagerly, wherever the inputs are."""

from __future__ import annotations

import os
import random

import pytest
import torch
from helpers import graph_faults as faults
from helpers.graph_calls import Function, floats, ids, indirect, same
from torch import nn

from vattn.graphs import make_capturable

pytestmark = pytest.mark.gpu

CALLS = 100 if os.environ.get("VATTN_SHORT") else 3000  # under compute-sanitizer


def cumulated(x):
    return x.sort(-1).values.cumsum(-1)


def copied_first(x):
    y = torch.empty_like(x)
    y.copy_(x)
    return y + x


def attention(q, k, v):
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


FORWARDS = {
    "one kernel": (lambda x: x * 2 + 1, lambda seed: (floats(100, 100, seed=seed),)),
    "several kernels": (lambda x: x.softmax(-1) + x.sum() - x.amax(0), lambda seed: (floats(99, 101, seed=seed),)),
    "a copy of memory": (copied_first, lambda seed: (floats(128, 128, seed=seed),)),
    "sorted": (cumulated, lambda seed: (floats(64, 3000, seed=seed),)),
    "many at once": (
        lambda *x: torch.cat(torch._foreach_add(list(x), 1)),
        lambda seed: tuple(floats(16, 16, seed=seed + number) for number in range(30)),
    ),
    "attention": (
        attention,
        lambda seed: [floats(2, 4, 128, 64, seed=seed + i, dtype=torch.bfloat16) for i in range(3)],
    ),
    "rows by index": (lambda x, at: x[at], lambda seed: (floats(100, 32, seed=seed), ids(50, seed=seed))),
    "complex": (lambda x: torch.fft.rfft(x).abs(), lambda seed: (floats(32, 256, seed=seed),)),
    "products": (
        torch.matmul,
        lambda seed: [floats(1024, 1024, seed=seed + i, dtype=torch.bfloat16) for i in range(2)],
    ),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_inputs_at_other_addresses_are_read(name):
    forward, make = FORWARDS[name]
    made = indirect(forward, *make(0))
    kept = []
    for seed in range(1, 6):
        kept.append(make(seed))
        same(made, *kept[-1])
    for tensors in (kept[2], kept[2], kept[0]):
        same(made, *tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_of_a_library_are_read_through(dtype):
    """On Hopper these are kernels whose parameters hold descriptors of the input (CUtensorMap)."""
    made = indirect(
        nn.Sequential(nn.Linear(4096, 4096), nn.GELU(), nn.Linear(4096, 64)).to(dtype), floats(2048, 4096, dtype=dtype)
    )
    for seed in (1, 2, 3):
        same(made, floats(2048, 4096, seed=seed, dtype=dtype), exact=False)


def test_convolutions_are_read_through():
    made = indirect(nn.Conv2d(64, 64, 3, padding=1), floats(8, 64, 32, 32))
    for seed in (1, 2):
        same(made, floats(8, 64, 32, 32, seed=seed), exact=False)


def test_indices_are_read_where_they_are():
    made = indirect(nn.Embedding(100, 64), ids(4, 32))
    for seed in (1, 2, 3):
        same(made, ids(4, 32, seed=seed))


def test_a_triton_kernel_is_read_through():
    pytest.importorskip("triton")
    from helpers.tripled import tripled

    made = indirect(lambda x: tripled(x) + 1, floats(1000, 33))
    for seed in (1, 2, 3):
        same(made, floats(1000, 33, seed=seed))


def test_views_misaligned_and_strided_inputs():
    made = indirect(lambda x: x.sin() * 2, floats(64, 64))
    memory = floats(64 * 64 * 4, seed=1)
    for offset in (64, 128, 4096, 1, 2, 3, 4, 17):  # the first three are multiples of 256 bytes
        same(made, memory[offset : offset + 4096].view(64, 64))
    same(made, memory.view(128, 128)[:64, :64])
    same(made, memory[:4096].view(64, 64).T)
    same(made, memory[:64].expand(64, 64))
    same(made, memory[:4096].view(64, 64))


def test_a_number_that_is_read_with_its_sign_or_conjugate_to_come():
    made = indirect(lambda x: torch.view_as_real(x.resolve_conj() * 1j), floats(32, 32, dtype=torch.complex64))
    x = floats(32, 32, seed=1, dtype=torch.complex64) + 2j
    same(made, x)
    same(made, x.conj())
    made = indirect(lambda x: x * 2, floats(32))
    same(made, torch.randn(64, dtype=torch.complex64, device="cuda").conj().imag[:32])


def test_the_same_tensor_twice_and_parts_of_one():
    made = indirect(lambda x, y: x * 3 - y, floats(64, 64), floats(64, 64, seed=1))
    x, both = floats(64, 64, seed=2), floats(2, 64, 64, seed=3)
    same(made, x, x)
    same(made, x, both[0])
    same(made, both[1], both[0])
    same(made, both[0], both[0])


def test_an_input_that_comes_out_again_is_copied():
    made = indirect(lambda x, y: (x, y[1:], x + y), floats(8, 64), floats(8, 64, seed=1), copied=(0, 1))
    for seed in (2, 3):
        same(made, floats(8, 64, seed=seed), floats(8, 64, seed=seed + 5))
    made = indirect(lambda x, y: (x.T, x + y), floats(8, 64), floats(8, 64, seed=1), copied=(0,))
    same(made, floats(8, 64, seed=4), floats(8, 64, seed=5))


def test_an_input_that_nothing_reads_is_left_alone():
    made = indirect(lambda x, y: x * 2, floats(64, 64), floats(64, 64, seed=1))
    same(made, floats(64, 64, seed=2), floats(64, 64, seed=3))


def test_values_that_no_test_could_tell_apart_are_copied():
    made = indirect(lambda x, at: x[at], floats(8, 64), torch.arange(8).cuda(), copied=(1,))
    same(made, floats(8, 64, seed=1), torch.arange(8).flip(0).cuda())


def test_an_input_may_be_freed_right_after_the_call():
    """The memory is taken by the next tensor while the replay may still run."""
    made = indirect(lambda x: (x @ x).relu(), floats(2048, 2048))
    x = floats(2048, 2048, seed=1)
    expected = made.module(x)
    found = []
    with torch.no_grad():
        for _ in range(50):
            found.append(made(x.clone()))
            torch.full((2048, 2048), float("nan"), device="cuda")
    for each in found:
        torch.testing.assert_close(each, expected)


def test_an_input_may_change_after_the_call():
    made = indirect(lambda x: x + 1, floats(1 << 22))
    x = torch.zeros(1 << 22, device="cuda")
    with torch.no_grad():
        found = [made(x.fill_(number)) for number in range(20)]
    for number, each in enumerate(found):
        assert bool((each == number + 1).all())


def test_outputs_that_are_not_copied_may_come_in_again():
    made = indirect(lambda x: (x + 1, x.flip(0)), floats(64, 64), copy_outputs=False)
    made.capture(floats(32, 64))
    x, expected = floats(64, 64, seed=1), floats(64, 64, seed=1)
    with torch.no_grad():
        for turn in range(6):
            one, _ = made(x)
            x = one if turn % 3 else one.clone()
            expected = expected + 1
            torch.testing.assert_close(x, expected)
        y = floats(64, 64, seed=2)
        _, flipped = made(y)
        again, twice = made(flipped)
        torch.testing.assert_close(again, y.flip(0) + 1)
        torch.testing.assert_close(twice, y)
    assert not made.eager_calls


def test_streams_and_buffers():
    class Running(faults.Linear):
        def __init__(self):
            super().__init__()
            self.register_buffer("total", torch.zeros(8))

        def forward(self, x):
            self.total.add_(x.sum(0))
            return super().forward(x) + self.total

    made, twin = indirect(Running(), floats(3, 8)), Running().cuda()
    streams, expected, found = [torch.cuda.Stream(), torch.cuda.Stream()], [], []
    with torch.no_grad():
        for seed in range(20):
            x = floats(3, 8, seed=seed)
            expected.append(twin(x))
            torch.cuda.synchronize()
            with torch.cuda.stream(streams[seed % 2]):
                found.append(made(x))
        torch.cuda.synchronize()
    torch.testing.assert_close(found, expected)
    assert not made.eager_calls


def test_random_calls_are_as_eagerly():
    """Signatures, addresses, alignments and strides in any order, thousands of times."""
    draw = random.Random(0)
    module = Function(lambda x, at, y=None: (x.cumsum(-1)[:, at] * (1 if y is None else y)).softmax(-1) + at).cuda()
    rows = (4, 33, 256)
    made = make_capturable(module, (floats(4, 64), ids(64, below=64)), choice="indirect")
    for n in rows:
        made.capture(floats(n, 64), ids(64, below=64))
        made.capture(floats(n, 64), ids(64, below=64), floats(n, 64))
    assert made.report.num_graphs == 6
    assert all(signature.choice == "indirect" for signature in made.report.signatures)
    pool = floats(1 << 20)
    numbers = ids(1 << 16, below=64)

    def part(memory, *shape):
        count = torch.Size(shape).numel()
        start = draw.randrange(len(memory) - 4 * count)
        start -= start % draw.choice([1, 2, 4, 64, 64, 64])
        if len(shape) == 2 and draw.random() < 0.1:
            return memory[start : start + 2 * count].view(shape[0], 2 * shape[1])[:, :: draw.choice([1, 2])][
                :, : shape[1]
            ]
        found = memory[start : start + count].view(shape)
        return found.clone() if draw.random() < 0.5 else found

    with torch.no_grad():
        for _ in range(CALLS):
            n = draw.choice(rows)
            given = [part(pool, n, 64), part(numbers, 64)]
            if draw.random() < 0.5:
                given.append(given[0] if draw.random() < 0.2 else part(pool, n, 64))
            torch.testing.assert_close(made(*given), module(*given), rtol=1e-5, atol=1e-6)
    assert not made.eager_calls


@pytest.mark.unsanitized
def test_the_fastest_way_is_taken():
    x = floats(1 << 26)  # a copy takes as long as the forward
    made = make_capturable(Function(lambda x: x.sum()), (x,))
    (signature,) = made.report.signatures
    assert signature.choice in ("indirect", "eager"), made.report
    times = dict(signature.times)
    assert set(times) == {"eager", "graph", "indirect"}
    assert times["indirect"] < 0.8 * times["graph"]
    assert "µs" in str(made.report)
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(60))).cuda()  # launches of kernels that take no time
    made = make_capturable(layers, (floats(8, 64),))
    (signature,) = made.report.signatures
    assert signature.choice in ("graph", "indirect"), made.report
    same(made, floats(8, 64, seed=1), exact=False)
    made = make_capturable(Function(lambda x: x + 1).cuda(), (floats(1 << 10),))
    (signature,) = made.report.signatures
    times = dict(signature.times)
    assert times[signature.choice] <= 1.02 * min(times.values())
    if signature.choice == "eager":
        assert made.report.num_graphs == 0
        made(floats(1 << 10))
        assert made.eager_calls == {"the forward was faster than a replay": 1}


def test_eager_captures_nothing():
    made = make_capturable(faults.HostMask().cuda(), (floats(3, 8),), choice="eager")
    assert made.report.num_graphs == 0
    assert [finding.kind for finding in made.report.findings] == ["host"]
    assert made.report.signatures == ()


def test_timing_leaves_the_module_as_it_was():
    class Running(faults.Linear):
        def __init__(self):
            super().__init__()
            self.register_buffer("total", torch.zeros(8))

        def forward(self, x):
            self.total.add_(x.sum(0))
            return super().forward(x)

    module = Running().cuda()
    made = make_capturable(module, (floats(3, 8),))
    assert len(made.report.signatures) == 1
    assert not module.total.any()
    assert not made.eager_calls
