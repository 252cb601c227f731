"""``vattn serve`` beside the engine alone and beside ``vllm serve``, for 64 clients who read streams.

See README.md. The 8B shape needs an NVIDIA GPU with 80 GB; ``--quick`` tries everything but vLLM on a tiny model.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from client import Case, Run, at_engine, at_server
from common import Records
from decoding import SHAPES as LLAMA

from vattn import Engine
from vattn.models import load

ROOT = Path(__file__).resolve().parents[2]
NEEDS = ("transformers", "fastapi", "uvicorn", "aiohttp")
MAX_MODEL_LEN = 2048
READY_SECONDS = 400
CASES = {
    "8B": Case("8B", 128256, requests=256, streams=64),
    "tiny": Case("tiny", 1000, requests=24, streams=8, prompt=(20, 60), answer=(10, 30), repeats=1),
}
SHAPES = {
    "8B": LLAMA["8B"],
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
UNITS = {"tokens_per_s": "tokens/s"}  # the others are milliseconds
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
OFFLINE |= {"VLLM_USE_FLASHINFER_SAMPLER": "0"}  # it would be compiled first; for greedy tokens nothing is sampled
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}


def write_model(folder: Path, case: Case, device: str) -> None:
    """Random weights, and a tokenizer of as many words, so that each token is text and is sent at once."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|end|>", *letters, *(f"Ġw{i}" for i in range(case.vocab_size - len(letters) - 1))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    config = LlamaConfig(vocab_size=case.vocab_size, max_position_embeddings=8192, **SHAPES[case.name], **ends)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    model.save_pretrained(folder, max_shard_size="4GB")


@contextmanager
def served(command: Sequence[str], path: Sequence[Path], log: Path) -> Iterator[tuple[str, float]]:
    """A server's address, and the seconds from its start until it said that it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    paths = os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])])
    url, begin = f"http://127.0.0.1:{port}", time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, **OFFLINE, **LOOPBACK, "PYTHONPATH": paths},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # with the processes that it starts
        )
    try:
        while not _is_ready(url):
            if process.poll() is not None or time.perf_counter() - begin > READY_SECONDS:
                raise RuntimeError(f"{' '.join(command)} did not start:\n{_end_of(log)}")
            time.sleep(0.05)
        yield url, time.perf_counter() - begin
        if process.poll() is not None:
            raise RuntimeError(f"{' '.join(command)} ended:\n{_end_of(log)}")
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _end_of(log: Path) -> str:
    """Lines that tell of errors, of all processes, and the last ones."""
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join([line for line in lines[:-20] if "Error" in line][-20:] + lines[-20:])


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def add(records: Records, case: Case, system: str, runs: Sequence[Run]) -> None:
    found = [run.metrics() for run in runs]
    name = f"{case.name} streams={case.streams}"
    for metric in found[0]:
        records.add(name, system, metric, UNITS.get(metric, "ms"), [each[metric] for each in found])
    records.write()


def run_server(records: Records, case: Case, system: str, command: Sequence[str], path: Sequence[Path]) -> None:
    """Start it, warm it up with a trace, and time others."""
    with records.going_on(system), tempfile.TemporaryDirectory() as folder:
        with served(command, path, Path(folder) / "log") as (url, ready_s):
            runs = [at_server(url, case.name, case.trace(seed), case.streams) for seed in range(case.repeats + 1)]
        records.add(f"{case.name} start", system, "ready", "s", [ready_s])
        add(records, case, system, runs[1:])


def run_engine(records: Records, case: Case, folder: Path, device: str) -> None:
    with records.going_on("engine"):
        model, _ = load(folder, device, torch.bfloat16 if device == "cuda" else torch.float32)
        memory_limit = None if device == "cuda" else 1 << 28
        with Engine(model, max_batch=case.streams, memory_limit=memory_limit) as engine:
            engine.warm_up()
            runs = [at_engine(engine, case.trace(seed), case.streams) for seed in range(case.repeats + 1)]
        add(records, case, "engine", runs[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", type=Path, metavar="FOLDER", help="where vLLM is installed (pip install --target)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, and few tokens")
    options = parser.parse_args()
    case = CASES["tiny" if options.quick else "8B"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if case.name == "8B" and device == "cpu":
        parser.error("the 8B shape needs a GPU; --quick runs anywhere")
    records = Records("17_server", options.quick)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, case, device)
        if device == "cuda":
            torch.cuda.empty_cache()
        common = ["--served-model-name", case.name, "--max-model-len", str(MAX_MODEL_LEN)]
        common += ["--max-num-seqs", str(case.streams)]
        memory = [] if device == "cuda" else ["--memory-limit", "256MiB"]
        run_server(records, case, "vattn", ["-m", "vattn", "serve", str(folder), *common, *memory], [ROOT])
        if options.vllm is not None:
            command = ["-m", "vllm.entrypoints.cli.main", "serve", str(folder), *common]
            run_server(records, case, "vllm", [*command, "--gpu-memory-utilization", "0.85"], [options.vllm])
        run_engine(records, case, folder, device)
    records.end()


if __name__ == "__main__":
    main()
