"""What the native library is for: host time of a page, in a batch and alone, with it and without.

``python native/measure.py [--device cuda]`` prints the table of this folder's README. Both ways take turns, so that
what else the machine does hits both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time

from vattn.driver import Driver, native, open_driver

PAGE_BYTES, NUM_PAGES, NUM_ROUNDS = 2 << 20, 256, 12


def busy(stop: threading.Event) -> None:
    """Another Python thread with something to do, as a decode loop has."""
    while not stop.is_set():
        time.sleep(0)


def create_and_map(driver: Driver, base: int, batch: int) -> tuple[float, float]:
    """Microseconds a page: (create, map with access), in batches of so many pages."""
    create_s = map_s = 0.0
    handles: list[int] = []
    for first in range(0, NUM_PAGES, batch):
        addresses = [base + index * PAGE_BYTES for index in range(first, first + batch)]
        start = time.perf_counter()
        driver.create_pages(PAGE_BYTES, batch, handles)
        middle = time.perf_counter()
        driver.map_pages(PAGE_BYTES, addresses, handles[first:], [])
        create_s, map_s = create_s + middle - start, map_s + time.perf_counter() - middle
    driver.unmap(base, NUM_PAGES * PAGE_BYTES)
    for handle in handles:
        driver.release(handle)
    return create_s / NUM_PAGES * 1e6, map_s / NUM_PAGES * 1e6


def measure(device: str, batch: int, beside: bool) -> dict[str, list[tuple[float, float]]]:
    """By way, (create, map) of each round."""
    found: dict[str, list[tuple[float, float]]] = {"1": [], "0": []}
    for _ in range(NUM_ROUNDS):
        for way, rounds in found.items():
            os.environ["VATTN_NATIVE"] = way
            driver = open_driver(device)
            base = driver.reserve(NUM_PAGES * PAGE_BYTES)
            stop = threading.Event()
            other = threading.Thread(target=busy, args=(stop,))
            if beside:
                other.start()
            rounds.append(create_and_map(driver, base, batch))
            stop.set()
            if beside:
                other.join()
            driver.free_range(base, NUM_PAGES * PAGE_BYTES)
            driver.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    os.environ.pop("VATTN_NATIVE", None)
    if reason := native.why_not():
        raise SystemExit(f"there is nothing to compare: {reason}")
    print("| µs a page of 2 MiB | create, native | create, Python | map, native | map, Python |")
    print("| --- | --- | --- | --- | --- |")
    for batch, beside in ((NUM_PAGES, False), (NUM_PAGES, True), (1, False), (1, True)):
        found = measure(device, batch, beside)
        cells = []
        for call in (0, 1):
            for way in ("1", "0"):
                tenths = statistics.quantiles([each[call] for each in found[way]], n=10)
                cells.append(f"{tenths[4]:.1f} ({tenths[1]:.1f} to {tenths[7]:.1f})")
        case = f"{'one by one' if batch == 1 else f'{batch} in a batch'}{', beside a busy thread' if beside else ''}"
        print("|", case, "|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
