"""Renders one chat template in a separate process with limits on time and memory: templates are programs from a file.

`chat_template.py` runs it as a script. Each line of JSON gets one line of JSON in reply: first the template, then the
conversations. The environment is that of transformers' `apply_chat_template`. Its sandbox limits a template to its
variables; the limits protect the machine's time and memory.
"""

import json
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

CPU_S = 5  # CPU time limit of one conversation
MEMORY_BYTES = 256 << 20  # memory limit, beyond the interpreter's own
MOST_CHARACTERS = 16 << 20


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training; here it only opens a scope."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own way)

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the enclosed block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclosed"), [], [], body).set_lineno(line)

    def _enclosed(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """`dict` without the attributes of a class."""

    def __call__(self, *given: Any, **named: Any) -> dict[Any, Any]:
        return dict(*given, **named)

    def fromkeys(self, *given: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*given)


class _PublicNamespace(Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*given: Any, **named: Any) -> None:
        self, *others = given
        values = dict(*others, **named)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the name {name!r} begins with an underscore")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def environment() -> Environment:
    """The Jinja environment of transformers."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    made.globals["dict"] = _Dict()
    made.globals["namespace"] = _PublicNamespace
    return made


def _bound_memory() -> None:
    """Limit the address space, after all imports, where the system can."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ImportError, OSError, ValueError):
        pass


def _bound_time() -> None:
    """Set the CPU time limit for the next conversation; the system ends a process beyond it."""
    try:
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(used.ru_utime + used.ru_stime) + 1 + CPU_S
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    except (ImportError, OSError, ValueError):
        pass


def _said(error: BaseException) -> str:
    name = type(error).__name__
    if isinstance(error, MemoryError):
        return "it takes too much memory"
    if isinstance(error, RecursionError):
        return "it is nested too deeply, or calls itself without end"
    return str(error) if isinstance(error, TemplateError) else f"{name}: {error}"


def _answer(line: bytes, template: Any, made: Environment) -> tuple[Any, dict[str, Any]]:
    """(the current template, the reply)."""
    try:
        given = json.loads(line)
        if "template" in given:
            try:
                parsed = made.parse(given["template"])
                found = made.from_string(parsed)
            except TemplateSyntaxError as error:
                return None, {"broken": f"{error.message} (line {error.lineno})"}
            return found, {"variables": sorted(meta.find_undeclared_variables(parsed))}
        text = template.render(**given["variables"])
        if len(text) > MOST_CHARACTERS:
            return template, {"refused": f"it writes more than {MOST_CHARACTERS} characters"}
        return template, {"text": text}
    except Exception as error:  # anything that a program from a file can cause
        return template, {"broken" if template is None else "refused": _said(error)[:2000]}


def main() -> None:
    """Reply to lines until the input ends."""
    made, template = environment(), None
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    _bound_memory()
    for line in sys.stdin.buffer:
        _bound_time()
        template, answer = _answer(line, template, made)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
