"""A capture that leaves PyTorch as it was, also where it fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from ..interrupts import FinalisersWait, GarbageWaits, Uninterrupted

__all__ = ["CaptureFailed", "captured"]

# Captures that CUDA gave up. torch's allocator asks them for ever whether an allocation is theirs.
_GIVEN_UP: list[torch.cuda.CUDAGraph] = []


class CaptureFailed(RuntimeError):
    """CUDA gave a capture up, as where the host waits for the device in it. Its pool takes no other one."""


def captured(run: Callable[[], object], pool: Any = None) -> torch.cuda.CUDAGraph:
    """A graph of what ``run`` launches on the current stream, which must not be the default one.

    Other threads may allocate and map meanwhile; this one runs no finaliser of ours and no signal handler, and the
    garbage collector waits. Work under way goes on, as ``torch.cuda.graph`` would not let it: that waits for the
    device, and frees what torch keeps for the next launch.

    Args:
        run: has run before, so that kernels are compiled and workspaces made.
        pool: of another graph, or a handle; None for one of its own.

    Raises:
        CaptureFailed: says what ``run`` raised, if it did.
        Exception: what ``run`` raises by itself.
    """
    graph = torch.cuda.CUDAGraph()
    with Uninterrupted(), FinalisersWait(), GarbageWaits():
        _begin(graph, pool)
        raised: BaseException | None = None
        try:
            run()
        except BaseException as error:
            raised = error
            raise
        finally:
            try:
                graph.capture_end()
            except RuntimeError as error:
                _GIVEN_UP.append(graph)
                _recover()
                if raised is None or isinstance(raised, Exception):
                    raise CaptureFailed(str(raised or error)) from (raised or error)
            finally:
                # With its traceback it would hold this frame, and its callers', until garbage is collected.
                del raised
    return graph


def _begin(graph: torch.cuda.CUDAGraph, pool: Any = None) -> None:
    graph.capture_begin(**({} if pool is None else {"pool": pool}), capture_error_mode="thread_local")


def _recover() -> None:
    """CUDA gave a capture up, and PyTorch's random numbers are as under one until another ends well."""
    another = torch.cuda.CUDAGraph()
    with suppress(RuntimeError):
        _begin(another)
        try:
            torch.zeros(1, device="cuda")
        finally:
            another.capture_end()
