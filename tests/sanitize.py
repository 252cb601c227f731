"""The GPU suite under compute-sanitizer, many processes at once: one would take hours, most of them on the CPU.

    python tests/sanitize.py [--plain] [--workers 11] [--seconds 3600] [--tests FILE]

``--plain`` leaves compute-sanitizer out: the GPU suite whole and at full length, only sooner than in one process.
A chunk is some tests of one module in a process of its own, whose output goes to ``build/sanitize``. The tests that
did not pass, or that time was too short for, are named in ``build/sanitize/left.txt``, which ``--tests`` takes.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "build" / "sanitize"
MEMCHECK = (
    *("compute-sanitizer", "--tool", "memcheck", "--target-processes", "all", "--error-exitcode", "77"),
    # API errors are what many tests make on purpose; a backtrace holds Python's frames, and what lives in them.
    *("--report-api-errors", "no", "--show-backtrace", "no"),
)
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m")
# These look at what the whole GPU has free: last, one by one, and not under compute-sanitizer, which takes some of it.
ALONE = ("test_device_memory", "test_two_processes")
# The tests of a chunk, for modules whose tests take a minute each; the longest begin first.
CHUNKS = {
    "test_model_numerics": 1,
    "test_attention_hazards": 4,
    "test_hf_gpu": 4,
    "test_cli_tune": 1,
    "test_lifetimes": 4,
    "test_decode_failures": 5,
    "test_decode_numerics": 2,
    "test_decode": 4,
    "test_second_device": 6,
    "test_fuzz": 4,
    "test_hf_steps": 7,
    "test_llama": 2,
    "test_faults": 30,
    "test_triton_decode": 30,
}
USUAL_CHUNK = 60
NO_TESTS = 5  # what pytest returns where a chunk has none that is to run


class Chunk:
    """Some tests of one module, and how they went."""

    def __init__(self, number: int, tests: Sequence[str]) -> None:
        self.tests = tests
        self.module = module_of(tests[0])
        self.log = LOGS / f"{number:03d}_{self.module}.txt"
        self.outcome: int | None = None

    def run(self, command: Sequence[str], devices: str, seconds: float) -> None:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": devices, "OMP_NUM_THREADS": "1"}
        if command[0] == MEMCHECK[0]:
            environment["VATTN_SHORT"] = "1"
        with self.log.open("w") as log, subprocess.Popen(
            [*command, *self.tests], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        ) as process:  # fmt: skip
            try:
                self.outcome = process.wait(max(1, seconds))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)

    def summary(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return next(
            (line for line in reversed(lines) if re.match(r"\d+ (passed|failed|skipped|error)", line)), "no summary"
        )


def module_of(test: str) -> str:
    return Path(test.split("::")[0]).stem


def collect(marked: str) -> list[str]:
    done = subprocess.run([*PYTEST, marked, "--collect-only"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


def chunks_of(tests: Sequence[str]) -> list[Chunk]:
    modules: defaultdict[str, list[str]] = defaultdict(list)
    for test in tests:
        modules[module_of(test)].append(test)
    chunks: list[Chunk] = []
    for module in sorted(modules, key=lambda module: [*CHUNKS, module].index(module)):
        count = -(-len(modules[module]) // CHUNKS.get(module, USUAL_CHUNK))
        chunks += [Chunk(len(chunks) + k, modules[module][k::count]) for k in range(count)]
    return chunks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="without compute-sanitizer")
    parser.add_argument("--workers", type=int, default=max(1, len(os.sched_getaffinity(0)) * 3 // 4), help="at once")
    parser.add_argument("--seconds", type=float, default=7200, help="what has not ended by then is stopped")
    parser.add_argument("--tests", type=Path, help="a file that names the tests, a line each, instead of all")
    args = parser.parse_args()
    begin = time.monotonic()
    devices = [str(index) for index in range(torch.cuda.device_count())]
    if not devices or not (args.plain or shutil.which(MEMCHECK[0])):
        raise SystemExit("needs an NVIDIA GPU, and compute-sanitizer, which comes with the CUDA toolkit, on the PATH")
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    marked = "gpu" if args.plain else "gpu and not unsanitized"
    command = [*(() if args.plain else MEMCHECK), *PYTEST, marked]
    chunks = chunks_of(args.tests.read_text().splitlines() if args.tests else collect(marked))
    alone = [chunk for chunk in chunks if chunk.module in ALONE]
    chunks = [chunk for chunk in chunks if chunk not in alone]
    waiting: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
    for chunk in chunks:
        waiting.put(chunk)
    print(f"{sum(len(chunk.tests) for chunk in chunks)} tests in {len(chunks)} chunks", flush=True)

    def work(device: str) -> None:
        while (left := args.seconds - (time.monotonic() - begin)) > 20:
            try:
                chunk = waiting.get_nowait()
            except queue.Empty:
                return
            chunk.run(command, ",".join(devices) if chunk.module == "test_second_device" else device, left)
            report(chunk)

    def report(chunk: Chunk) -> None:
        state = {0: "ok", NO_TESTS: "none", 77: "ERRORS", None: "TIME"}.get(chunk.outcome, "FAILED")
        print(f"{time.monotonic() - begin:6.0f} s  {state:6s} {chunk.log.stem}: {chunk.summary()}", flush=True)

    threads = [threading.Thread(target=work, args=(devices[k % len(devices)],)) for k in range(args.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for chunk in alone if args.plain else ():
        chunk.run(command, devices[0], args.seconds - (time.monotonic() - begin))
        report(chunk)
        chunks.append(chunk)
    left = [test for chunk in chunks if chunk.outcome not in (0, NO_TESTS) for test in chunk.tests]
    (LOGS / "left.txt").write_text("".join(f"{test}\n" for test in left))
    totals: Counter[str] = Counter()
    for chunk in chunks:
        for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", chunk.summary()):
            totals[word] += int(count)
    bad = sum(chunk.outcome == 77 for chunk in chunks)
    print(f"{dict(totals)}; {bad} chunks with errors that compute-sanitizer found; {len(left)} tests left", flush=True)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
