"""``vattn tune``: time the kernels for a model's shapes on this GPU, alone and in steps, and keep what won."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..errors import ConfigError, OutOfPages
from ..models import FusedLlama, Llama, LlamaConfig
from ..models.fused_llama import products
from ..ops.triton_support import unavailable
from ..tuning import table_paths, table_to_add_to
from ..tuning.choices import choices_for
from ..tuning.measure import measure_attention, measure_linear, measure_prefill
from ..tuning.steps import choose_in_steps
from .model import read_config
from .options import parse_whole
from .text import one_line

__all__ = ["tune"]

_PREFILL = ((512, 512), (2048, 2048), (8192, 8192), (2048, 32768))  # new tokens, all tokens
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def tune(args: argparse.Namespace) -> None:
    """Measure, print a line for each product and each case of attention, and write the table of this GPU.

    Raises:
        ConfigError: no GPU, no Triton, or no model config where one was named.
    """
    configs = [read_config(path) for path in args.models]
    batches, contexts = (_numbers(name, getattr(args, name)) for name in ("batches", "contexts"))
    if not torch.cuda.is_available():
        raise ConfigError("vattn tune needs an NVIDIA GPU; PyTorch finds none (see vattn info)")
    if reason := unavailable():
        raise ConfigError(reason)
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = _DTYPES[args.dtype]
    table = table_to_add_to(device)
    path, _ = table_paths(table.gpu)
    for config in configs:
        linear = [
            record
            for outputs, inputs, kind in dict.fromkeys(products(config))
            for record in measure_linear(outputs, inputs, batches, dtype, device, kind, table.pdl, _print_linear)
        ]
        cases = [(batch, context) for batch in batches for context in contexts]
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        attention = measure_attention(*heads, dtype, device, cases, table.pdl, _print_attention)
        try:
            model = partial(_small_model, config, dtype, device)
            choose_in_steps(model, linear, attention, dtype, device, table.pdl, _print_step)
        except (torch.OutOfMemoryError, OutOfPages) as error:
            print(f"no room for steps, so the other kernels are those that are fastest alone: {one_line(error)}")
        table.add("linear", linear)
        table.add("attention", attention)
        table.add("prefill", measure_prefill(*heads, dtype, device, _PREFILL, _print_attention))
        table.write(path)
        choices_for(device).forget({"kind": "decode step"})  # they were measured with the kernels of before
    print(f"written: {one_line(path)}")


def _small_model(
    config: LlamaConfig, dtype: torch.dtype, device: torch.device, num_layers: int, max_seq_len: int
) -> FusedLlama:
    small = replace(config, num_layers=min(num_layers, config.num_layers), windows=None)
    return FusedLlama(Llama.random(small, dtype=dtype, device=device), max_seq_len)


def _numbers(name: str, text: str) -> list[int]:
    try:
        return sorted({parse_whole(part, 1, 1 << 31) for part in text.split(",")})
    except ConfigError as error:
        raise ConfigError(f"--{name}, numbers with commas between them: {error}") from error


def _print_linear(record: dict[str, Any]) -> None:
    config = record["config"]
    tile = (
        "cuBLAS"
        if config is None
        else f"{config['block_n']}x{config['block_k']}, {config['splits']} splits, {config['num_warps']} warps"
    )
    what = f"{record['outputs']} x {record['inputs']}" + (" + SwiGLU" if record["swiglu"] else "")
    times = f"{record['us']:8.1f} us  cuBLAS {record['cublas_us']:8.1f} us"
    print(f"{what:28s} {record['tokens']:4d} tokens  {times}  {tile}", flush=True)


def _print_attention(record: dict[str, Any]) -> None:
    case = "batch {batch}, context {context}" if "batch" in record else "{new} new tokens of {total}"
    times = ", ".join(f"{name} {us:.1f}" for name, us in sorted(record["us"].items(), key=lambda item: item[1]))
    print(f"attention, {case.format(**record)}:  {times} us", flush=True)


def _print_step(batch: int, context: int, before_us: float, after_us: float) -> None:
    times = f"{before_us:.1f} us before the choice, {after_us:.1f} us after"
    print(f"step, batch {batch}, context {context}:  {times}", flush=True)
