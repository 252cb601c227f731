"""Source archive and wheel, as ``python -m build`` makes them: everything inside, importable away from the sources."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


LIBRARY = "vattn/driver/_native.abi3.so"


def build(folder: Path, **environment: str) -> Path:
    """The wheel, built from a copy of the sources: building in place would leave files behind in them."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "vattn", "models", "native"):
        subprocess.run(["cp", "-r", ROOT / name, source], check=True)
    (source / LIBRARY).unlink(missing_ok=True)
    # The source archive first, and the wheel from what that holds.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment})
    assert len(list(folder.glob("vattn-*.tar.gz"))) == 1
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_every_module_and_the_type_marker(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "vattn").rglob("*.py")}
    sources |= {f"vattn/{path.relative_to(ROOT)}" for path in (ROOT / "models").rglob("*.py")}
    assert sources <= names
    tables = {str(path.relative_to(ROOT)) for path in (ROOT / "vattn/tuning/tuned").glob("*.json")}
    assert len(tables) >= 2
    assert {"vattn/py.typed", "vattn/serve/status.html", *tables} <= names
    assert not any(name.startswith(("tests", "models/", "experiments")) for name in names)


def test_the_wheel_holds_the_native_library_where_there_is_a_compiler(wheel):
    if not shutil.which("c++"):
        pytest.skip("there is no C++ compiler")
    assert LIBRARY in zipfile.ZipFile(wheel).namelist()


def test_the_wheel_is_built_without_a_compiler(tmp_path):
    (tmp_path / "bin").mkdir()
    built = build(tmp_path, PATH=str(tmp_path / "bin"), CC="no-compiler", CXX="no-compiler")
    names = zipfile.ZipFile(built).namelist()
    assert "vattn/driver/native.py" in names
    assert {
        f"vattn/native/{name}" for name in ("decode_step.cu", "instructions.cuh", "ring.cuh", "attention.cuh")
    } <= set(names)
    assert LIBRARY not in names


def test_an_installed_wheel_works_away_from_its_sources(wheel, tmp_path):
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target]
    subprocess.run([*command, wheel], check=True)
    script = (
        "import vattn, vattn.models.llama as llama; "
        f"assert vattn.__file__.startswith(r'{target}') and llama.__file__.startswith(r'{target}'), llama.__file__; "
        "print(vattn.__version__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    child = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() in wheel.name
    info = subprocess.run(
        [sys.executable, "-m", "vattn", "info", "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert info.returncode == 0, info.stderr
    (host,) = [driver for driver in json.loads(info.stdout)["drivers"] if driver["name"] == "host"]
    assert (host["detail"]["native"] == "library used") == (LIBRARY in zipfile.ZipFile(wheel).namelist())
