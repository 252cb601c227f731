"""Where rows lie: known numbers, and properties over odd shapes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vattn import ConfigError, KVLayout, LayerGroup
from vattn.layout import SUPPORTED_DTYPES

MIB = 1 << 20


def llama_8b(order="token", max_seq_len=131072):
    return KVLayout(32, 8, 128, max_seq_len, torch.bfloat16, order)


# -- known numbers ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("order", "tokens"), [("token", 16.0), ("layer", 1024.0)])
def test_sizes_of_an_8b_model(order, tokens):
    layout = llama_8b(order)
    assert (layout.num_layers, layout.bytes_per_token) == (32, 131072)
    assert layout.tokens_per_page(2 * MIB) == tokens
    assert isinstance(layout.tokens_per_page(2 * MIB), float)
    (group,) = layout.groups
    assert layout.plan(group, 64, 2 * MIB).size_bytes == 1 << 40


def test_a_page_need_not_hold_whole_tokens():
    layout = KVLayout(30, 3, 64, 2048, torch.float32)  # the shape of SmolLM2-135M
    assert layout.bytes_per_token == 46080
    assert layout.tokens_per_page(2 * MIB) == pytest.approx(45.51, abs=0.01)
    assert KVLayout(1, 1, 1024, 8, torch.float64).tokens_per_page(4096) == 0.25


def test_token_order():
    layout = llama_8b()
    plan = layout.plan(layout.groups[0], 64, 2 * MIB)
    (lane,) = plan.lanes
    assert (lane.row_bytes, lane.slot_stride_bytes, lane.slot_offset(63)) == (131072, 1 << 34, 63 << 34)
    for layer in (0, 31):
        assert plan.k[layer].shape == plan.v[layer].shape == (64, 131072, 8, 128)
        assert plan.k[layer].strides == plan.v[layer].strides == (1 << 33, 65536, 128, 1)
        assert (plan.k[layer].offset, plan.v[layer].offset) == (layer * 2048, layer * 2048 + 1024)


def test_layer_order():
    layout = llama_8b("layer", 1024)
    plan = layout.plan(layout.groups[0], 4, 2 * MIB)
    assert len(plan.lanes) == 64
    assert plan.k[0].strides == (1024 * 1024, 1024, 128, 1)
    offsets = [tensor.offset for layer in range(32) for tensor in (plan.k[layer], plan.v[layer])]
    assert offsets == [index * 4 * 1024 * 1024 for index in range(64)]


def test_groups_with_shapes_of_their_own():
    sliding = LayerGroup([0, 2, 5], 2, 16, v_head_dim=8, window=128)
    full = LayerGroup((1, 7), np.int64(1), 32)
    layout = KVLayout(groups=[sliding, full], max_seq_len=100, dtype=torch.float16)
    assert layout.layers == (0, 1, 2, 5, 7)
    assert layout.bytes_per_token == 3 * 2 * (16 + 8) * 2 + 2 * 1 * (32 + 32) * 2
    assert layout.tokens_per_page(4096) == 4096 / 288
    one, other = (layout.plan(group, 3, 4096) for group in layout.groups)
    assert (set(one.k), set(other.v)) == ({0, 2, 5}, {1, 7})
    assert (one.k[5].shape, one.v[5].shape, other.v[7].shape) == ((3, 100, 2, 16), (3, 100, 2, 8), (3, 100, 1, 32))
    assert one.v[5].strides[1:] == (144, 8, 1)
    assert (one.k[2].offset, one.v[2].offset) == (48, 80)
    assert full.window is None


def test_v_head_dim_without_groups():
    layout = KVLayout(4, 2, 192, 64, torch.bfloat16, v_head_dim=128)
    assert layout.bytes_per_token == 4 * 2 * (192 + 128) * 2
    assert layout.plan(layout.groups[0], 1, 4096).v[0].shape == (1, 64, 2, 128)


def test_numpy_ints_are_ints():
    layout = KVLayout(np.int32(2), np.uint8(3), np.int64(5), np.int16(7), torch.int8)
    assert layout.bytes_per_token == 2 * 2 * 3 * 5


def test_repr_says_what_it_is():
    assert "bytes_per_token=131072" in repr(llama_8b())


# -- properties ------------------------------------------------------------------------------------------------------
@st.composite
def layouts(draw):
    layers = draw(st.permutations(range(6)))
    cut = draw(st.integers(1, 4))
    small = st.integers(1, 5)
    groups = [
        LayerGroup(part, draw(small), draw(small), draw(st.none() | small))
        for part in draw(st.sampled_from([[layers[:cut]], [layers[:cut], layers[cut:]]]))
    ]
    dtype, order = draw(st.sampled_from(SUPPORTED_DTYPES)), draw(st.sampled_from(["token", "layer"]))
    return KVLayout(groups=groups, max_seq_len=draw(st.integers(1, 9)), dtype=dtype, order=order)


# Small and odd pages beside real ones: one holds many tokens, no whole number of them, or less than one.
PAGES = st.sampled_from([64, 72, 96, 256, 1000, 4096])


def elements(plan):
    """The index of every element of a view, in the view's shape."""
    index = np.full(plan.shape, plan.offset, np.int64)
    for axis, (count, stride) in enumerate(zip(plan.shape, plan.strides, strict=True)):
        shape = [1] * len(plan.shape)
        shape[axis] = count
        index += (np.arange(count) * stride).reshape(shape)
    return index


@settings(max_examples=150, deadline=None)
@given(layouts(), st.integers(1, 3), PAGES)
def test_views_tile_their_slots_and_never_overlap(layout, max_slots, page_bytes):
    size = layout.dtype.itemsize
    for group in layout.groups:
        plan = layout.plan(group, max_slots, page_bytes)
        users = np.zeros(plan.size_bytes // size, np.int64)
        for tensor in (*plan.k.values(), *plan.v.values()):
            index = elements(tensor).ravel()
            assert 0 <= index.min() <= index.max() < users.size
            users += np.bincount(index, minlength=users.size)
        expected = np.zeros_like(users)
        for lane in plan.lanes:
            for slot in range(max_slots):
                start = lane.slot_offset(slot)
                expected[start // size : (start + layout.max_seq_len * lane.row_bytes) // size] += 1
        assert np.array_equal(users, expected)
        assert users.max() == 1


@settings(max_examples=150, deadline=None)
@given(layouts(), st.integers(1, 3), PAGES)
def test_slots_share_no_page_and_flatten_to_one_token_axis(layout, max_slots, page_bytes):
    for group in layout.groups:
        plan = layout.plan(group, max_slots, page_bytes)
        assert plan.size_bytes == max_slots * sum(lane.slot_stride_bytes for lane in plan.lanes)
        assert plan.size_bytes % page_bytes == 0
        for lane in plan.lanes:
            unit = math.lcm(page_bytes, lane.row_bytes)
            assert lane.offset_bytes % page_bytes == lane.slot_stride_bytes % unit == 0
            assert 0 <= lane.slot_stride_bytes - layout.max_seq_len * lane.row_bytes < unit
        for tensor in (*plan.k.values(), *plan.v.values()):
            slot_stride, token_stride, head_stride, element_stride = tensor.strides
            assert slot_stride % token_stride == 0
            assert (head_stride, element_stride) == (tensor.shape[3], 1)


@given(layouts())
def test_bytes_per_token_is_what_the_lanes_add_up_to(layout):
    lanes = [lane for group in layout.groups for lane in layout.plan(group, 1, 4096).lanes]
    assert layout.bytes_per_token == sum(lane.row_bytes for lane in lanes)
    assert layout.tokens_per_page(4096) == 4096 / max(lane.row_bytes for lane in lanes)


# -- errors ----------------------------------------------------------------------------------------------------------
GOOD = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8, "max_seq_len": 16, "dtype": torch.float32}


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "head_dim", "max_seq_len", "v_head_dim"])
@pytest.mark.parametrize("value", [0, -1, 1.0, 2.5, True, "4", math.nan, math.inf, [3], torch.tensor(4)], ids=repr)
def test_sizes_are_positive_ints(name, value):
    with pytest.raises(ConfigError, match=name) as caught:
        KVLayout(**GOOD | {name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "head_dim", "max_seq_len"])
def test_sizes_must_be_given(name):
    with pytest.raises(ConfigError, match=f"{name} .*None"):
        KVLayout(**GOOD | {name: None})


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.int32, torch.int64, torch.complex64, torch.quint8, "float16", np.float32, None, []],
    ids=repr,
)
def test_unsupported_dtypes(dtype):
    with pytest.raises(ConfigError, match=r"dtype must be one of .*torch\.bfloat16") as caught:
        KVLayout(**GOOD | {"dtype": dtype})
    assert repr(dtype) in str(caught.value)


@pytest.mark.parametrize("order", ["tokens", "", None, 0, []])
def test_unknown_orders(order):
    with pytest.raises(ConfigError, match='"token" or "layer"') as caught:
        KVLayout(**GOOD, order=order)
    assert repr(order) in str(caught.value)


GROUP = LayerGroup([0], 1, 8)


@pytest.mark.parametrize("groups", [[], (), "ab", [GROUP, None], [{"layers": [0]}], GROUP, 5, {}], ids=repr)
def test_groups_are_a_sequence_of_groups(groups):
    with pytest.raises(ConfigError, match="groups"):
        KVLayout(groups=groups, max_seq_len=16)


@pytest.mark.parametrize("extra", [{"num_layers": 2}, {"num_kv_heads": 2}, {"head_dim": 8}, {"v_head_dim": 8}], ids=str)
def test_groups_or_sizes(extra):
    with pytest.raises(ConfigError, match="not both"):
        KVLayout(groups=[GROUP], max_seq_len=16, **extra)


def test_a_layer_in_two_groups():
    with pytest.raises(ConfigError, match=r"\(0, 1, 1, 2\)"):
        KVLayout(groups=[LayerGroup([0, 1], 1, 8), LayerGroup([1, 2], 1, 8)], max_seq_len=16)


@pytest.mark.parametrize("layers", [[], [0, 0], [-1], [1.0], [True], "01", 3, None, {0, 1}], ids=repr)
def test_layers_of_a_group(layers):
    with pytest.raises(ConfigError, match="layer"):
        LayerGroup(layers, 1, 8)


@pytest.mark.parametrize("name", ["num_kv_heads", "head_dim", "v_head_dim", "window"])
@pytest.mark.parametrize("value", [0, -3, 1.5, True, "8"], ids=repr)
def test_sizes_of_a_group(name, value):
    with pytest.raises(ConfigError, match=name) as caught:
        LayerGroup(**{"layers": [0], "num_kv_heads": 1, "head_dim": 8, name: value})
    assert repr(value) in str(caught.value)
