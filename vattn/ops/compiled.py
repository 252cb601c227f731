"""CUDA C++ of ``native``, compiled by NVRTC for one GPU and one shape, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import torch

from ..errors import ConfigError, DriverError
from ..machine import user_folder

__all__ = ["block_shared_bytes", "check", "compiled", "compiler_missing", "loaded"]


@cache
def compiler_missing() -> str | None:
    """Why nothing can be compiled here, as a phrase; None: it can."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
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
    path = user_folder("kernels") / f"{name}-{digest}.cubin"
    try:
        return path.read_bytes()
    except OSError:  # not there, or not to be read
        pass
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)  # whole or not at all, for others who read it meanwhile
    except OSError:  # a cache that cannot be written to is none
        pass
    return code


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
