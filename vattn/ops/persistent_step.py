"""A decode step of few tokens as one persistent kernel: ``native/decode_step.cu``, compiled for one model at run time.

A step of few tokens takes as long as reading the weights does. Kernels that follow one another each begin and end with
an idle memory. This one copies weights into shared memory whenever there is room, and computes behind that.
It is not always faster than many kernels: measure both.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ..errors import ConfigError
from .compiled import block_shared_bytes, check, compiled, compiler_missing, loaded

__all__ = ["MAX_TOKENS", "PersistentStep", "StepLayer", "StepShape", "persistent_unavailable", "shared_memory"]

MAX_TOKENS = 8  # what a matrix instruction takes
INCLUDED = ("instructions.cuh", "ring.cuh", "attention.cuh")  # of decode_step.cu
_SIZES = (1, 2, 4, 8)  # there is a kernel for each
_MAX_SPLITS = 32  # a lane of a warp for each

# As in native/ring.cuh and decode_step.cu: warps, bytes of a stage, of sums, and more than of all else.
_CONSUMERS, _PRODUCERS, _PAD = 8, 4, 64
_STAGE_BYTES, _SUM_BYTES, _SMALL_BYTES = 16 * (512 * 2 + _PAD), 2 * _CONSUMERS * 8 * 20 * 4, 6 * 1024
_MIN_STAGES = _CONSUMERS  # a warp takes every eighth stage: with fewer in the ring it would be a round ahead of it


@dataclass(frozen=True)
class StepShape:
    """A model's sizes, as the kernel is compiled for them."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    layers: int

    def unsupported(self) -> str | None:
        """Why there is no kernel for it, as a phrase; None: there is."""
        if self.head_dim not in (64, 128):
            return f"heads of {self.head_dim} elements; it takes 64 or 128"
        if self.heads % self.kv_heads or self.heads // self.kv_heads > 8:
            return f"{self.heads} heads over {self.kv_heads} KV heads; it takes up to 8 heads to each KV head"
        if any(size % 32 for size in (self.hidden, self.intermediate)):
            return f"sizes {self.hidden} and {self.intermediate}; it takes multiples of 32"
        if self.layers > 128:
            return f"{self.layers} layers; it takes up to 128"
        return None


@dataclass(frozen=True)
class StepLayer:
    """One layer's weights, contiguous bfloat16, and its part of the cache.

    Attributes:
        qkv: ``[(heads + 2 * kv_heads) * head_dim, hidden]``.
        o: ``[hidden, heads * head_dim]``.
        gate_up: ``[2 * intermediate, hidden]``, gates first.
        down: ``[hidden, intermediate]``.
        norm, mlp_norm: ``[hidden]``.
        q_norm, k_norm: ``[head_dim]`` or None.
        qkv_bias, o_bias, gate_up_bias, down_bias: of the products' outputs, or None.
        k, v: ``[slots, rows, kv_heads, head_dim]``, any strides but the last.
        window: rows that a query sees; None for all.
    """

    qkv: torch.Tensor
    o: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    norm: torch.Tensor
    mlp_norm: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    qkv_bias: torch.Tensor | None = None
    o_bias: torch.Tensor | None = None
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    window: int | None = None


_POINTERS = (
    *("qkv", "qkv_bias", "q_norm", "k_norm", "o", "o_bias", "gate_up", "gate_up_bias", "down", "down_bias"),
    *("norm", "mlp_norm", "k", "v"),
)


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_longlong) for name in ("k_slot", "k_row", "k_head", "v_slot", "v_row", "v_head", "window")),
    )


@cache
def _step_type(layers: int) -> Any:
    addresses = (
        *("norm", "output", "angles", "slots", "rows", "embedded", "logits"),
        *("stream", "qkv", "partials", "attended", "activated", "counters"),
    )

    class Step(ctypes.Structure):
        _fields_ = (
            ("layers", _Layer * layers),
            *((name, ctypes.c_void_p) for name in addresses),
            ("eps", ctypes.c_float),
            ("scale", ctypes.c_float),
            ("batch", ctypes.c_int),
            ("splits", ctypes.c_int),
        )

    return Step


def persistent_unavailable(device: torch.device, dtype: torch.dtype, shape: StepShape, tokens: int) -> str | None:
    """Why there is no persistent step there, as a phrase; None: there is.

    Args:
        device: of the weights and the cache.
        dtype: of both.
        shape: of the model.
        tokens: of a step at most.
    """
    if device.type != "cuda":
        return "it needs an NVIDIA GPU"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return f"it is for GPUs of compute capability 9.0 (Hopper), this is {torch.cuda.get_device_name(device)}"
    if dtype != torch.bfloat16:
        return f"it takes weights and caches of bfloat16, got {dtype}"
    if not 1 <= tokens <= MAX_TOKENS:
        return f"it takes 1 to {MAX_TOKENS} tokens, got {tokens}"
    if (reason := shape.unsupported()) is not None:
        return reason
    try:
        shared_memory(shape, _size(tokens), block_shared_bytes(device))
    except ConfigError as error:
        return str(error)
    return compiler_missing()


class PersistentStep:
    """Logits of one new token of each sequence, by one cooperative kernel that takes the whole GPU.

    It reads slots and rows from the device, so that a captured launch serves every batch of its size. Launches follow
    one another on one stream: they share scratch memory.

    Args:
        shape: of the model.
        layers: weights and caches, which are kept.
        norm: ``[hidden]``, of the last norm.
        output: ``[vocab, hidden]``.
        angles: ``rope_table``, ``[positions, 2, head_dim / 2]`` float32.
        eps: of the norms.
        max_tokens: of a step, up to ``MAX_TOKENS``.

    Raises:
        ConfigError: there is none for the shape, the device or the dtype, or a tensor is not contiguous.
        DriverError: CUDA refused the kernel.
    """

    def __init__(
        self,
        shape: StepShape,
        layers: Sequence[StepLayer],
        norm: torch.Tensor,
        output: torch.Tensor,
        angles: torch.Tensor,
        eps: float,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        self.device, self.shape = output.device, shape
        if (reason := persistent_unavailable(self.device, output.dtype, shape, max_tokens)) is not None:
            raise ConfigError(f"no persistent step: {reason}")
        self.max_tokens = max_tokens
        self._kept = (tuple(layers), norm, output, angles)
        self._step = _step_type(shape.layers)
        self._sms = _num_multiprocessors(self.device)
        self._filled = self._step()
        for to, layer in zip(self._filled.layers, layers, strict=True):
            self._fill(to, layer)
        self._filled.norm, self._filled.output, self._filled.angles = map(_address, (norm, output, angles))
        self._filled.eps = eps
        self._filled.scale = shape.head_dim**-0.5 * 1.4426950408889634
        self._scratch(self.max_tokens)

    def __call__(self, residual: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Append the tokens' K and V, and compute the logits, on the current stream.

        Args:
            residual: ``[batch, hidden]`` contiguous, the tokens' embeddings.
            slots, rows: ``[batch]`` int32, of each token; rows ``[0, row]`` are backed and writable.

        Returns:
            ``[batch, vocab]`` bfloat16.

        Raises:
            ConfigError: more tokens than ``max_tokens``.
        """
        batch = residual.shape[0]
        if batch > self.max_tokens:
            raise ConfigError(f"this persistent step takes up to {self.max_tokens} tokens, got {batch}")
        from cuda.bindings import driver

        function, shared = _kernel(self.device.index or 0, self.shape, _size(batch))
        logits = residual.new_empty(batch, self.shape.vocab)
        step = self.arguments(residual, slots, rows, logits)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = self._sms, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = 32 * (_CONSUMERS + _PRODUCERS), 1, 1
        config.sharedMemBytes = shared
        config.hStream = driver.CUstream(torch.cuda.current_stream(self.device).cuda_stream)
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        attribute.value.cooperative = 1
        config.attrs, config.numAttrs = [attribute], 1
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(step))
        with torch.cuda.device(self.device):
            check("cuLaunchKernelEx", driver.cuLaunchKernelEx(config, function, ctypes.addressof(arguments), 0))
        return logits

    def arguments(
        self, residual: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, logits: torch.Tensor
    ) -> ctypes.Structure:
        """What the kernel is launched with, ``Step`` in ``native/ring.cuh``; ``logits`` takes the result."""
        step = self._step.from_buffer_copy(self._filled)
        step.slots, step.rows = slots.data_ptr(), rows.data_ptr()
        step.embedded, step.logits = _address(residual), logits.data_ptr()
        step.batch = residual.shape[0]
        step.splits = self._splits(step.batch)
        return step

    def _splits(self, batch: int) -> int:
        """Multiprocessors that share a token and KV head."""
        return max(1, min(self._sms // (batch * self.shape.kv_heads), _MAX_SPLITS))

    def _scratch(self, tokens: int) -> None:
        shape, device = self.shape, self.device
        qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        units = max(batch * shape.kv_heads * self._splits(batch) for batch in range(1, tokens + 1))
        group = shape.heads // shape.kv_heads
        words = {
            "stream": tokens * shape.hidden // 2,
            "qkv": tokens * qkv,
            "partials": units * group * (shape.head_dim + 2),
            "attended": tokens * shape.heads * shape.head_dim // 2,
            "activated": tokens * shape.intermediate // 2,
            "counters": 2,
        }
        self._memory = {name: torch.zeros(count, dtype=torch.int64, device=device) for name, count in words.items()}
        for name, tensor in self._memory.items():
            setattr(self._filled, name, tensor.data_ptr())

    @staticmethod
    def _fill(to: _Layer, layer: StepLayer) -> None:
        for name in _POINTERS:
            tensor = getattr(layer, name)
            setattr(to, name, tensor.data_ptr() if name in "kv" else None if tensor is None else _address(tensor))
        for tensor in (layer.k, layer.v):
            if tensor.stride(3) != 1 or tensor.data_ptr() % 16 or any(stride % 8 for stride in tensor.stride()[:3]):
                raise ConfigError(
                    f"a persistent step takes heads of K and V in one piece, got strides {tensor.stride()}"
                )
        to.k_slot, to.k_row, to.k_head = layer.k.stride()[:3]
        to.v_slot, to.v_row, to.v_head = layer.v.stride()[:3]
        to.window = 2**31 - 1 if layer.window is None else layer.window


def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _size(tokens: int) -> int:
    return next(size for size in _SIZES if tokens <= size)


def _address(tensor: torch.Tensor) -> int:
    address = tensor.data_ptr()
    if not tensor.is_contiguous() or address % 16:
        raise ConfigError("a persistent step takes contiguous tensors at multiples of 16 bytes; call .contiguous()")
    return address


def shared_memory(shape: StepShape, tokens: int, limit: int) -> tuple[int, int, int]:
    """How a multiprocessor's shared memory is used: (stages of the ring, bytes for activations, bytes in all).

    Args:
        tokens: of a step at most.
        limit: bytes of a block.

    Raises:
        ConfigError: too little is left for the ring.
    """
    group, attended = shape.heads // shape.kv_heads, shape.heads * shape.head_dim
    attention = (group + 2) * shape.head_dim * 2 + _CONSUMERS * group * shape.head_dim * 4
    rows = (tokens * (inner * 2 + _PAD) for inner in (shape.hidden, attended, shape.intermediate))
    x = -(-max(attention, *rows) // 128) * 128
    stages = (limit - x - _SUM_BYTES - _SMALL_BYTES) // _STAGE_BYTES
    if stages < _MIN_STAGES:
        raise ConfigError(f"the activations of {tokens} tokens leave too little shared memory for the weights")
    return stages, x, stages * _STAGE_BYTES + x + _SUM_BYTES + _SMALL_BYTES


def macros_of(shape: StepShape, tokens: int, stages: int, x_bytes: int) -> dict[str, int]:
    """What the kernel is compiled with; ``stages`` and ``x_bytes`` as ``shared_memory`` gives them."""
    return {
        "HIDDEN": shape.hidden,
        "HEADS": shape.heads,
        "KV_HEADS": shape.kv_heads,
        "HEAD_DIM": shape.head_dim,
        "INTER": shape.intermediate,
        "VOCAB": shape.vocab,
        "LAYERS": shape.layers,
        "TOKENS": tokens,
        "STAGES": stages,
        "X_BYTES": x_bytes,
    }


@cache
def _kernel(device: int, shape: StepShape, tokens: int) -> tuple[Any, int]:
    """The loaded kernel, and its bytes of shared memory."""
    stages, x, shared = shared_memory(shape, tokens, block_shared_bytes(device))
    macros = macros_of(shape, tokens, stages, x)
    code = compiled("decode_step.cu", INCLUDED, macros, "sm_90a")
    return loaded(code, "decode_step", device, shared), shared
