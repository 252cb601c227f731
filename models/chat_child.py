"""Renders chat templates in a process of its own, with bounds on time and memory.

A template comes with a model, from anyone. jinja's sandbox keeps it from running Python, but not from looping for hours
or filling memory. ``chat_template.py`` starts this file as a program, without vattn, and sends it lines of JSON.
"""

import datetime
import functools
import importlib.metadata
import json
import resource
import signal
import sys
from typing import Any

CPU_SECONDS = 1.0
MEMORY_BYTES = 512 << 20
TEXT_BYTES = 1 << 20  # that a template may add to what its messages hold, each up to eight times


def main() -> None:
    """Answer each line of stdin, a request, with a line on stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    for limit, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, MEMORY_BYTES)):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    sys.path[:] = json.loads(sys.stdin.readline())
    for line in sys.stdin:
        # The signal ends this process wherever it is; nothing in a template can stop it.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            request = json.loads(line)
            text = compiled(request["template"]).render(**request["variables"])
            if len(text) > TEXT_BYTES + 8 * len(line):
                answer = {"error": f"it writes {len(text)} characters"}
            else:
                answer = {"text": text}
        except MemoryError:
            answer = {"error": f"it needs more than {MEMORY_BYTES >> 20} MiB"}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:1000]}
        encoded = json.dumps(answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(encoded + "\n")
        sys.stdout.flush()


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> Any:
    """The template, in an environment with what transformers' documentation offers to templates."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox
    import jinja2.utils

    version = importlib.metadata.version("jinja2")
    if [int(part) for part in version.split(".")[:3] if part.isdigit()] < [3, 1, 6]:
        raise ImportError(f"chat templates need jinja2 3.1.6 or newer (older sandboxes can be left), not {version}")

    class Generation(jinja2.ext.Extension):
        """``{% generation %}`` marks what an assistant wrote, for training."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class Namespace(jinja2.utils.Namespace):
        """Without names that begin with an underscore, which have served to leave sandboxes."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args
            for name in dict(*rest, **kwargs):
                plain_name(name)
            jinja2.utils.Namespace.__init__(self, *rest, **kwargs)

        def __setitem__(self, name: str, value: Any) -> None:
            plain_name(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def plain_name(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.sandbox.SecurityError(f"a namespace takes no name that begins with an underscore, as {name!r}")

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.globals["namespace"] = Namespace
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    return environment.from_string(template)


if __name__ == "__main__":
    main()
