"""The process that runs chat templates: one JSON request a line on stdin, one answer a line on stdout.

A template is a program from somebody else. Jinja's sandbox keeps it from Python's insides, but not from looping for
ever or making a text of a terabyte. So it runs here: the memory is limited, no file and no connection can be opened,
and who asks can end the process. Nothing of this program is imported.

Request: {"source": template, "values": names that it sees}. Answer: {"text": ...}, {"refused": what raise_exception
was told} or {"failed": what went wrong}.
"""

import functools
import json
import re
import resource
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

MEMORY = 1 << 30  # bytes of address space
ROOM = 1 << 20  # characters that a template may write, and as often the conversation itself:
COPIES = 16
WARM = (
    "{{ name | tojson }}{{ strftime_now('%Y') }}",
    "{{ raise_exception('no') }}",
    "{{ ''.__class__.x }}",
    "{% for %}",
)
SAID = 300  # characters of a message that are passed on
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # marks of what is trained; here the answer is


class Refused(Exception):
    """raise_exception was called."""


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter as Hugging Face's templates know it: arguments by position too, and nothing is escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: object) -> str:
    raise Refused(str(message))


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """The template, compiled with what Hugging Face's templates expect to find."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(_GENERATION.sub("", source))


def answer(line: str) -> dict[str, str]:
    """The answer to one request."""
    request: dict[str, Any] = json.loads(line)
    try:
        values = request["values"]
        now = datetime.fromisoformat(values.pop("now", "") or datetime.now().isoformat())
        text = compiled(request["source"]).render(strftime_now=now.strftime, **values)
    except Refused as refusal:
        return {"refused": str(refusal)[:SAID]}
    except MemoryError:
        return {"failed": f"it needs more than {MEMORY >> 20} MiB"}
    except Exception as error:  # a template is a program: it may fail in any way
        return {"failed": f"{type(error).__name__}: {error}"[:SAID]}
    if len(text) > ROOM + COPIES * len(line):
        return {"failed": f"it writes {len(text)} characters"}
    return {"text": text}


def main() -> None:
    """Answers until the other side is gone."""
    for source in WARM:  # what Python, Jinja and the C library open late is opened while that is possible
        answer(json.dumps({"source": source, "values": {"name": "x"}}))
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, 3)):
        resource.setrlimit(kind, (most, most))
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(line)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
