"""Compiles grammars in a process of its own, with bounds on time and memory.

A schema comes from anyone, and a small one can ask for a grammar that takes all time and memory. ``grammar.py`` starts
this file as a program, without vattn, and sends it lines of JSON.
"""

import json
import os
import resource
import signal
import sys
from typing import Any

CPU_SECONDS = 10.0
MEMORY_BYTES = 4 << 30  # of torch and transformers, which xgrammar imports, for the most part
GRAMMAR_BYTES = 32 << 20  # of a compiled grammar as JSON


def main() -> None:
    """Answer each line of stdin, a request, with a line on stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    for limit, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_DATA, MEMORY_BYTES)):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # no context here
    sys.path[:] = json.loads(sys.stdin.readline())
    import xgrammar

    info = xgrammar.TokenizerInfo.deserialize_json(json.loads(sys.stdin.readline()))
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    for line in sys.stdin:
        # The signal ends this process wherever it is, in the compiler too.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        encoded = json.dumps(answered(compiler, json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(encoded + "\n")
        sys.stdout.flush()


def answered(compiler: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The compiled grammar as JSON, or what is wrong, which is no reason to end."""
    try:
        if "schema" in request:
            compiled = compiler.compile_json_schema(json.dumps(request["schema"]))
        else:
            compiled = compiler.compile_structural_tag(json.dumps(request["structural_tag"]))
        text = compiled.serialize_json()
    except MemoryError:
        return {"wrong": f"it needs more than {MEMORY_BYTES >> 20} MiB"}
    except Exception as error:
        # C++ source lines come first in the message.
        return {"wrong": str(error).strip().splitlines()[0].rpartition(".cc:")[2].partition(": ")[2] or str(error)}
    if len(text) > GRAMMAR_BYTES:
        return {"wrong": f"it compiles to {len(text) >> 20} MiB; at most {GRAMMAR_BYTES >> 20} MiB are accepted"}
    return {"compiled": text}


if __name__ == "__main__":
    main()
