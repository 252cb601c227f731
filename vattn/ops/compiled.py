"""CUDA C++ of ``native``, compiled by NVRTC for one GPU and one shape, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, DriverError
from ..machine import user_folder

__all__ = ["block_shared_bytes", "check", "compiled", "compiler_missing", "loaded"]

_DIGEST_BYTES = 32


@cache
def compiler_missing() -> str | None:
    """Why nothing can be compiled here, as a phrase; None: it can."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
        if not files("vattn.native").joinpath("decode_step.cu").is_file():
            return "its source is not installed: install vattn again"
    except ModuleNotFoundError as error:
        return f"{error.name} is missing: install vattn again, with cuda-python"
    except Exception as error:  # of the import, or of what looks for the library: each release has its own
        return f"it needs NVRTC, CUDA's compiler at run time (pip install nvidia-cuda-nvrtc): {error}"
    return None


def block_shared_bytes(device: torch.device | int) -> int:
    """The most shared memory that one block of a kernel may use on a GPU."""
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


def compiled(name: str, included: Sequence[str], macros: Mapping[str, int], architecture: str) -> bytes:
    """A file of ``native`` as machine code; from the user's cache where the same was compiled before.

    Args:
        name, included: the file, and those that it includes.
        macros: what it is compiled with.
        architecture: as ``"sm_90a"``.

    Raises:
        ConfigError: there is no compiler, or the file does not compile.
    """
    if (reason := compiler_missing()) is not None:
        raise ConfigError(f"{name} cannot be compiled: {reason}")
    from cuda.bindings import nvrtc

    folder = files("vattn.native")
    source, *texts = (folder.joinpath(each).read_bytes() for each in (name, *included))
    options = [f"-arch={architecture}", "-std=c++17", *(f"-D{key}={value}" for key, value in macros.items())]
    version = check("nvrtcVersion", nvrtc.nvrtcVersion())
    digest = hashlib.sha256(repr((source, texts, options, version)).encode()).hexdigest()[:32]
    path = user_folder("kernels") / f"{name}-{digest}.bin"
    if (code := _kept(path)) is not None:
        return code
    names = [each.encode() for each in included]
    program = check("nvrtcCreateProgram", nvrtc.nvrtcCreateProgram(source, name.encode(), len(texts), texts, names))[0]
    try:
        encoded = [option.encode() for option in options]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        if int(result):
            log = bytes(check("nvrtcGetProgramLogSize", nvrtc.nvrtcGetProgramLogSize(program))[0])
            nvrtc.nvrtcGetProgramLog(program, log)
            raise ConfigError(f"{name} does not compile: {log.decode(errors='replace')}")
        code = bytes(check("nvrtcGetCUBINSize", nvrtc.nvrtcGetCUBINSize(program))[0])
        check("nvrtcGetCUBIN", nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    _keep(path, code)
    return code


def _kept(path: Path) -> bytes | None:
    """What ``_keep`` wrote; None where there is nothing, or not all of it."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    code = content[_DIGEST_BYTES:]
    return code if code and hashlib.sha256(code).digest() == content[:_DIGEST_BYTES] else None


def _keep(path: Path, code: bytes) -> None:
    """Whole or not at all, for others who read it meanwhile. A cache that cannot be written to is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(hashlib.sha256(code).digest() + code)
                file.flush()
                os.replace(file.name, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(file.name)
                raise
    except OSError:
        pass


def loaded(code: bytes, name: str, device: int, shared_bytes: int) -> Any:
    """The kernel of that name on a GPU, which may use so many bytes of shared memory. It stays for good.

    Raises:
        DriverError: CUDA refused it.
    """
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the context, where there is none yet
        (module,) = check("cuModuleLoadData", driver.cuModuleLoadData(code))
        (function,) = check("cuModuleGetFunction", driver.cuModuleGetFunction(module, name.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check("cuFuncSetAttribute", driver.cuFuncSetAttribute(function, attribute, shared_bytes))
    return function


def check(call: str, returned: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call of cuda-bindings returned, less its result.

    Raises:
        DriverError: it failed.
    """
    result, *rest = returned
    if int(result):
        raise DriverError(call, result.name)
    return tuple(rest)
