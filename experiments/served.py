"""The engine as the serving experiments drive it, a tiny model to try them with, and vLLM in a process beside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vattn import Engine, Request
from vattn.models import LlamaConfig

TINY = LlamaConfig(
    vocab_size=500,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=8192,
)


class Vattn:
    """``workload.System``, and ``prefix.System``, over the engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.cancel = engine.cancel
        self._salt: str | None = None

    def with_salt(self, salt: str | None) -> Vattn:
        self._salt = salt
        return self

    def submit(self, prompt: Sequence[int], max_new_tokens: int) -> int:
        return self.engine.submit(Request(prompt, max_new_tokens=max_new_tokens, cache_salt=self._salt))

    def step(self) -> list[tuple[int, int]]:
        tokens = self.engine.step()
        for token in tokens:
            if token.error is not None:
                raise token.error
        return list(Counter(token.request_id for token in tokens).items())


def ask_vllm(script: Path, site: Path, timeout_s: float, *arguments: str) -> dict[str, Any]:
    """What a script of vLLM's side has found, by case, in a process that finds vLLM in ``site``.

    Raises:
        RuntimeError: it failed; has the end of what it said.
    """
    network = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        with (Path(folder) / "log").open("w+") as log:
            done = subprocess.run(
                [sys.executable, script, output, *arguments],
                env={**os.environ, **network, "PYTHONPATH": path},
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
                check=False,
            )
            if done.returncode:
                log.seek(0)
                raise RuntimeError(f"vLLM's side failed:\n{log.read()[-4000:]}")
        document = json.loads(output.read_text())
    print(document["about"])
    return document["found"]
