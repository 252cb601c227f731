"""``native/decode_step.cu`` itself, compiled for the CPU: every thread of the GPU is a fiber (``tests/emulated``).

What runs when is drawn at random: fibers take turns, copies arrive late, and shared memory begins as NaN.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import vattn
from vattn.attention import DecodeBatch, get
from vattn.models import FusedLlama, Llama, LlamaConfig
from vattn.models.ways import persistent_step as persistent_step_of
from vattn.models.ways import step_shape
from vattn.ops import persistent_step
from vattn.ops.ops_table import reference_ops

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")

TINY = LlamaConfig(
    vocab_size=37,
    hidden_size=96,
    intermediate_size=160,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=512,
)


@dataclass(frozen=True)
class Case:
    config: LlamaConfig
    lengths: tuple[int, ...]
    multiprocessors: int


CASES = {
    "one token": Case(TINY, (21,), 5),
    "one multiprocessor": Case(TINY, (3, 0), 1),
    "several splits and tokens": Case(replace(TINY, tie_word_embeddings=True), (150, 7), 9),
    "more units than multiprocessors": Case(replace(TINY, num_kv_heads=4), (9, 1, 30), 5),
    "normed heads of 128, biases": Case(
        replace(TINY, head_dim=128, qk_norm=True, attention_bias=True, mlp_bias=True, num_kv_heads=1), (130, 18), 4
    ),
    "windows": Case(replace(TINY, windows=(5, None)), (33, 3), 4),
    "more chunks than stages": Case(
        replace(TINY, hidden_size=64, intermediate_size=4640, num_layers=1, num_heads=3, num_kv_heads=1), (6,), 3
    ),
    "words heard in several rounds": Case(
        replace(TINY, hidden_size=64, intermediate_size=4640, num_layers=1, num_heads=3, num_kv_heads=1),
        (2, 1, 3, 4),
        3,
    ),
    "more than sixteen splits": Case(replace(TINY, num_kv_heads=1), (150,), 19),
    "several pieces of the stream a thread": Case(
        replace(TINY, hidden_size=2112, intermediate_size=64, num_layers=1, num_heads=1, num_kv_heads=1),
        (3, 2, 1, 0, 2),
        3,
    ),
}


def emulator(folder: Path, case: Case) -> tuple[ctypes.CDLL, int]:
    """The kernel for a case, and its bytes of shared memory."""
    shape, tokens = step_shape(case.config), persistent_step._size(len(case.lengths))
    stages, x, shared = persistent_step.shared_memory(shape, tokens, 227 * 1024)
    macros = persistent_step.macros_of(shape, tokens, min(stages, 9), x)  # a short ring is used again soon
    for name in ("decode_step.cu", *persistent_step.INCLUDED):
        shutil.copy(ROOT / "native" / name, folder)
    for path in (ROOT / "tests" / "emulated").iterdir():
        shutil.copy(path, folder)
    command = [
        "c++",
        "-std=c++20",
        "-O2",
        "-w",
        "-U_FORTIFY_SOURCE",
        "-shared",
        "-fPIC",
        *(f"-D{k}={v}" for k, v in macros.items()),
    ]
    subprocess.run([*command, "-x", "c++", folder / "decode_step.cpp", "-o", folder / "step.so"], check=True)
    return ctypes.CDLL(str(folder / "step.so")), shared


def off_by(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


class Sequences:
    """A model, and a cache of sequences of these lengths with room for one row more, which is NaN."""

    def __init__(self, model: Llama, lengths: tuple[int, ...]) -> None:
        self.fused, self.lengths = FusedLlama(model, ops=reference_ops()), lengths
        self.cache = vattn.KVCache(model.kv_layout(256), len(lengths) + 1, "cpu")
        self.slots = [self.cache.acquire() for _ in lengths]
        self.cache.ensure_batch(self.slots, [length + 1 for length in lengths])
        at = torch.tensor([self.slots, lengths], dtype=torch.int32)
        self.batch = DecodeBatch(at[0], at[1], at[1] + 1, 256)
        for rows in self.each():
            rows.normal_()
        self.forget_new_rows()

    def each(self) -> list[torch.Tensor]:
        """All rows of each layer's K and V of each sequence."""
        tensors = [
            tensor for layer in self.cache.layout.layers for tensor in (self.cache.k(layer), self.cache.v(layer))
        ]
        return [
            tensor[slot, : length + 1]
            for tensor in tensors
            for slot, length in zip(self.slots, self.lengths, strict=True)
        ]

    def new_rows(self) -> list[torch.Tensor]:
        return [rows[-1].clone() for rows in self.each()]

    def forget_new_rows(self) -> None:
        for rows in self.each():
            rows[-1] = float("nan")

    def decode(self, residual: torch.Tensor) -> list[torch.Tensor]:
        """By the references: logits, and the new rows."""
        logits = self.fused.decode(residual.clone(), self.batch, self.cache, get("reference"))
        return [logits, *self.new_rows()]


def random_models(config: LlamaConfig) -> tuple[Llama, Llama]:
    """Of bfloat16, with norms that are not one and biases that are not zero; and the same in float32."""
    torch.manual_seed(1)
    model = Llama.random(config, dtype=torch.bfloat16, std=0.05)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    exact = Llama.random(config)
    exact.load_state_dict(model.state_dict())
    return model, exact


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_kernel_computes_what_the_references_do(name, tmp_path, monkeypatch):
    case = CASES[name]
    library, shared = emulator(tmp_path, case)
    monkeypatch.setattr(persistent_step, "persistent_unavailable", lambda *_: None)
    monkeypatch.setattr(persistent_step, "_num_multiprocessors", lambda _: case.multiprocessors)
    model, exact_model = random_models(case.config)
    own, exact = Sequences(model, case.lengths), Sequences(exact_model, case.lengths)
    with own.cache, exact.cache:
        for rows, same in zip(own.each(), exact.each(), strict=True):
            same.copy_(rows)
        residual = torch.randn(len(own.slots), case.config.hidden_size, dtype=torch.bfloat16)
        expected, rounded = exact.decode(residual.float()), own.decode(residual)
        step = persistent_step_of(own.fused, own.cache, len(own.slots))
        runs = []
        for seed, embedded in enumerate((residual, torch.randn_like(residual), residual)):
            own.forget_new_rows()
            logits = torch.full((len(own.slots), case.config.vocab_size), float("nan"), dtype=torch.bfloat16)
            arguments = step.arguments(embedded, own.batch.slots_int32, own.batch.rows_int32, logits)
            finished = library.run(ctypes.byref(arguments), case.multiprocessors, ctypes.c_ulong(shared), seed)
            assert finished, "threads wait for good"
            runs.append([logits, *own.new_rows()])
        del runs[1]  # what it left in scratch memory the next one must not take for its own
        for i, (got, again, right, usual) in enumerate(zip(*runs, expected, rounded, strict=True)):
            assert torch.equal(got, again), f"result {i} depends on what ran when"
            assert off_by(got, right) < 1.3 * off_by(usual, right) + 0.003, f"result {i}"
