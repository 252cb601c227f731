"""Writes the tables, figures and plots of the READMEs, and the figures of the pages in docs/, from the experiments'
records: ``python experiments/render.py``.

* ``<!-- table NAME ARGUMENTS -->`` in a README, up to ``<!-- end -->``: what the function NAME of ``table.py``, of this
  file or of the ``report.py`` beside the README makes of the records beside it: most often ``pivot ROWS COLUMNS``.
* ``<!-- fig 04 SELECTOR SYSTEM[/SYSTEM] [FORMAT] -->``, likewise: ``table.figure`` of experiment 04's records (04+: of
  both of its runs).
* Where the report of 04_decode has a function ``plot``, its figure is that folder's ``decode.svg``.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import statistics
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import table
from table import Record, markdown, marked, read, records_of

_TABLE = re.compile(r"(^<!-- table (.+?) -->\n).*?(^<!-- end -->)", re.DOTALL | re.MULTILINE)
_FIGURE = re.compile(r"(<!-- fig (.+?) -->).*?(<!-- end -->)", re.DOTALL)


def cards(records: list[Record]) -> str:
    """One line for each machine and command that made records."""
    lines = {}
    for r in records:
        where = r["gpu"] if r["gpu"] != "none" else "CPU only"
        made = f"torch {r['torch']}, {r['date']}, commit {r['commit']}, `{r['command']}`"
        lines[where, r["command"]] = f"* {where} ({r['driver']}), {made}\n"
    return "".join(lines.values())


def again(records: list[Record]) -> str:
    """By metric: the spread within the first run, (p80 - p20) / median, and how far a second run was from it."""
    metrics: dict[str, list[Record]] = {}
    for record in records:
        if "again" in record and record["value"] and record["system"] != "limit":
            metrics.setdefault(record["metric"], []).append(record)

    def within(values: list[float], share: float) -> str:
        return f"{sorted(values)[math.ceil(share * len(values)) - 1]:.1%}"

    rows = []
    for metric, found in metrics.items():
        spread = [(r["p80"] - r["p20"]) / r["value"] for r in found]
        ratio = [r["again"] / r["value"] for r in found]
        apart = [abs(each - 1) for each in ratio]
        worst = max(range(len(found)), key=apart.__getitem__)
        row = [metric, str(len(found)), f"{within(spread, 0.5)}, {within(spread, 0.9)}" if any(spread) else "–"]
        row += [f"{statistics.median(ratio):.3f}", within(apart, 0.9)]
        rows.append([*row, f"{ratio[worst]:.3f} ({found[worst]['case']}, {found[worst]['system']})"])
    header = ["metric", "figures", "(80th - 20th percentile) / median: half, nine of ten below"]
    header += ["second / first, median", "difference of the runs: nine of ten below", "largest"]
    return markdown(header, rows) if rows else ""


@cache
def report(folder: Path) -> Any:
    """The module ``report.py`` of a folder; None where there is none."""
    if not (folder / "report.py").exists():
        return None
    sys.path.append(str(folder))  # a report may have modules of its own beside it
    spec = importlib.util.spec_from_file_location(f"report_{folder.name}", folder / "report.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def make(folder: Path, marker: str, records: list[Record]) -> str:
    """The table of a marker."""
    name, *arguments = marker.split()
    own: dict[str, Any] = {"cards": cards, "again": again, "pivot": table.pivot}
    function = own.get(name) or getattr(report(folder), name, None)
    if function is None:
        raise SystemExit(f"{folder.name}/README.md wants a table {name!r}, which {folder.name}/report.py does not make")
    return str(function(records, *arguments))


def render(readme: Path) -> str:
    """A page with its tables and figures made anew. Records that are not there, or not any more, leave them empty."""
    folder = table.FOLDER if readme.parent == table.FOLDER.parent else readme.parent
    records = records_of(folder.name) if folder != table.FOLDER else []
    missing = not records and (folder / "run.py").exists()
    text = _TABLE.sub(lambda m: m[1] + ("" if missing else make(folder, m[2], records)) + m[3], readme.read_text())
    return _FIGURE.sub(lambda m: m[1] + marked(m[2]) + m[3], text)


def pages() -> list[Path]:
    """All that is rendered: the experiments' READMEs, and outside them the README and docs/, where those are there."""
    root = table.FOLDER.parent
    found = [*sorted(table.FOLDER.rglob("README.md")), root / "README.md", *sorted((root / "docs").glob("*.md"))]
    return [page for page in found if page.exists()]


def show(path: Path) -> str:
    """The tables that these records make; those that they have no cases for are left out."""
    made, records = [], read(path)
    for _, marker, _ in _TABLE.findall((path.parent / "README.md").read_text()):
        with suppress(KeyError, ValueError):
            made.append(make(path.parent, marker, records))
    return "\n".join(filter(None, made))


def plots(check: bool, png: Path | None) -> list[Path]:
    """Draws what differs from its file, and returns it; ``check`` only compares, and only what this matplotlib drew."""
    if not importlib.util.find_spec("matplotlib"):
        print("plots are as they were: matplotlib is not installed (in a clone: pip install '.[experiments]')")
        return []
    import plotting

    stale = []
    for results in sorted(table.FOLDER.glob("*/results.jsonl")):
        folder, module = results.parent, report(results.parent)
        if not hasattr(module, "plot"):
            continue
        path = folder / f"{folder.name[3:]}.svg"
        try:
            drawn = plotting.svg(module.plot(read(results)), png / f"{path.stem}.png" if png else None)
        except (KeyError, ValueError) as error:
            print(f"{path.name} is as it was: its records lack what the plot takes ({error!r})")
            continue
        old = path.read_text() if path.exists() else ""
        if drawn != old and (not check or plotting.VERSION in old):
            stale.append(path)
            if not check:
                path.write_text(drawn)
    return stale


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", metavar="FILE", type=Path, help="print the tables that these records make, no more")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where something differs from its records"
    )
    parser.add_argument("--png", metavar="FOLDER", type=Path, help="plots as PNGs too, to look at")
    options = parser.parse_args()
    if options.show:
        print(show(options.show.resolve()))
        return 0
    stale, empty = [], 0
    for page in pages():
        text = render(page)
        for marker in re.findall(r"<!-- fig (.+?) -->–<!-- end -->", text):
            print(f"{page}: no record is what the figure {marker!r} asks for")
            empty += 1
        if text != page.read_text():
            stale.append(page)
            if not options.check:
                page.write_text(text)
    stale += plots(options.check, options.png)
    word = "differs from its records" if options.check else "written"
    print("\n".join(f"{word}: {path}" for path in stale) or "all tables, figures and plots agree with their records")
    return 1 if options.check and (stale or empty) else 0


if __name__ == "__main__":
    sys.exit(main())
