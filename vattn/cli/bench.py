"""``vattn bench``: run the experiments of the repository, one process each, and make their tables and plots."""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ConfigError, VattnError
from .text import one_line

__all__ = ["bench"]


@dataclass(frozen=True)
class Experiment:
    """A folder with ``run.py``, ``README.md`` and ``results.jsonl``; run.py says in NEEDS what it cannot do without."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def names(self) -> set[str]:
        """What it answers to: ``05_capacity``, ``05`` and ``capacity``."""
        return {self.name, *self.name.split("_", 1)}

    @property
    def question(self) -> str:
        """The README's first heading; nothing where it is not written yet."""
        if not (self.folder / "README.md").exists():
            return "(no README yet)"
        return (self.folder / "README.md").read_text().partition("\n")[0].removeprefix("#").strip()

    def lacks(self) -> str | None:
        """Why it cannot run here, or None."""
        found = re.search(r"^NEEDS = \((.*?)\)", (self.folder / "run.py").read_text(), re.MULTILINE)
        for need in re.findall(r'"([\w.]+)"', found[1] if found else ""):
            if need == "cuda" and not torch.cuda.is_available():
                return "needs an NVIDIA GPU, and PyTorch finds none"
            if need != "cuda" and importlib.util.find_spec(need) is None:
                return f"needs the module {need}, which is not installed (in a clone: pip install '.[experiments,hf]')"
        return None


def bench(args: argparse.Namespace) -> None:
    """Run experiments in their order; print their tables last.

    Raises:
        ConfigError: no experiments here, none of a name, or a whole run of all of them that nobody asked for.
        VattnError: an experiment failed; the others were run.
    """
    root = _folder(args.folder)
    found = [Experiment(path.parent) for path in sorted(root.glob("*/run.py"))]
    if args.names and args.all:
        raise ConfigError("give names of experiments or --all, not both")
    if not (args.names or args.all or args.quick):
        raise ConfigError(
            f"a run writes records, tables and plots in {one_line(root)} anew: give --all for that, or names out of "
            f"{one_line(', '.join(each.name for each in found))}, or --quick, which changes none of them"
        )
    chosen = _named(found, args.names)
    done: list[Experiment] = []
    failed: list[Experiment] = []
    skipped: list[str] = []
    for number, experiment in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {one_line(experiment.name)}: {one_line(experiment.question)}", flush=True)
        if reason := experiment.lacks():
            print(f"skipped: {one_line(reason)}\n", flush=True)
            skipped.append(experiment.name)
            continue
        command = [sys.executable, str(experiment.folder / "run.py"), *(["--quick"] if args.quick else [])]
        (done if subprocess.run(command, check=False).returncode == 0 else failed).append(experiment)
        print(flush=True)
    if done:
        _show(root, done, args.quick)
    if skipped:
        print(f"skipped: {one_line(', '.join(skipped))}")
    if failed:
        raise VattnError(f"failed: {', '.join(experiment.name for experiment in failed)}")


def _folder(given: str | None) -> Path:
    beside = Path(__file__).parents[2] / "experiments"
    for path in [Path(given)] if given else [Path("experiments"), beside]:
        if (path / "render.py").exists():
            return path.resolve()
    raise ConfigError(
        f"no experiments in {given or './experiments'}: they are not part of the installed package; run vattn bench in "
        "a clone of the repository"
    )


def _named(found: list[Experiment], names: list[str]) -> list[Experiment]:
    for name in names:
        if not any(name in each.names for each in found):
            raise ConfigError(f"there is no experiment {name!r}, only {', '.join(each.name for each in found)}")
    return [each for each in found if not names or each.names & set(names)]


def _show(root: Path, done: list[Experiment], quick: bool) -> None:
    """Tables of a quick run on the terminal; of a whole one in the READMEs too, with the plots."""
    if not quick:
        subprocess.run([sys.executable, root / "render.py"], check=True)
    for experiment in done:
        print(f"\n{one_line(experiment.question)}\n", flush=True)
        records = experiment.folder / ("quick.jsonl" if quick else "results.jsonl")
        subprocess.run([sys.executable, root / "render.py", "--show", records], check=True)
