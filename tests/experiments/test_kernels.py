"""Experiment 04's account of where a step's time goes: every microsecond is some part's, or a gap."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "04_decode"))
from busy import each_step
from kernels import PRODUCTS, parts_of

LAYER = (
    *("add_rms_norm_kernel", "skinny_linear_kernel", "rope_append_kernel", "decode_attention_kernel", "combine_kernel"),
    *("skinny_linear_kernel", "add_rms_norm_kernel", "nvjet_tst", "cublasLt::splitKreduce_kernel", "swiglu_linear"),
)
ORDER = (*PRODUCTS, *PRODUCTS, "output")
STEP = ("begin_step_kernel", *LAYER, *LAYER, "add_rms_norm_kernel", "skinny_linear_kernel", "sample_tokens_kernel")


def test_each_kernel_is_of_a_part():
    step = [(name, 10.0 * i, 10.0 * i + 7) for i, name in enumerate(STEP)]
    assert parts_of(step, ORDER) == {
        "begin-and-sample": 14,
        "norms-and-rope": 49,
        "qkv": 14,
        "attention": 28,
        "o": 14,
        "gate-up": 28,
        "down": 14,
        "output": 7,
        "gaps": 3.0 * (len(STEP) - 1),
    }


def test_rotary_embedding_inside_attention_is_attention():
    step = [name for name in STEP if name != "rope_append_kernel"]
    step = ["rope_decode_kernel" if name == "decode_attention_kernel" else name for name in step]
    parts = parts_of([(name, 10.0 * i, 10.0 * i + 7) for i, name in enumerate(step)], ORDER)
    assert (parts["attention"], parts["norms-and-rope"]) == (28, 35)


def test_kernels_that_overlap_are_counted_once():
    step = [(name, 5.0 * i, 5.0 * i + 7) for i, name in enumerate(STEP)]
    parts = parts_of(step, ORDER)
    assert sum(parts.values()) == step[-1][2] - step[0][1]
    assert parts["gaps"] == 0
    assert parts["output"] == 5


def test_a_prefill_ends_with_the_last_layer_s_k_and_v():
    layer = ("nvjet", "rope_append_kernel", "flash::prepare", "flash::attention", "nvjet", "nvjet", "swiglu_kernel")
    kernels = ("vectorized_gather_kernel", "add_rms_norm_kernel", *layer, "nvjet", "add_rms_norm_kernel", "nvjet")
    parts = parts_of([(name, 10.0 * i, 10.0 * i + 7) for i, name in enumerate(kernels)], (*PRODUCTS, "qkv"))
    assert (parts["qkv"], parts["attention"], parts["swiglu"], parts["down"]) == (14, 14, 7, 7)
    assert sum(parts.values()) == 10 * len(kernels) - 3


@pytest.mark.parametrize("layers", [1, 3])
def test_a_step_of_another_number_of_products_is_an_error(layers):
    with pytest.raises(ValueError, match=f"expected {4 * layers + 1} products, found another number"):
        parts_of([(name, float(i), i + 0.5) for i, name in enumerate(STEP)], (*PRODUCTS * layers, "output"))


def test_a_pause_of_the_host_is_one_step_s():
    assert each_step([4.0, 9.0, 4.0], 4) == [1, 1, 1, 1, 1, 1, 1, 6, 1, 1, 1, 1]
