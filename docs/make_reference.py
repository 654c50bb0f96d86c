"""Write docs/reference.md from the commands' own help. A test fails when it is out of date.

python docs/make_reference.py
"""

from pathlib import Path
from typing import Any

import click

from headrace.cli import main

TARGET = Path(__file__).parent / "reference.md"


def reference() -> str:
    """The page: every command's help, as the terminal shows it."""
    parts = ["# Reference\n\nMade by `python docs/make_reference.py` from `--help`.\n"]
    # As in a real invocation: click keeps the help option it makes first.
    settings: Any = {"terminal_width": 100, "max_content_width": 100, "help_option_names": ["-h", "--help"]}
    context = click.Context(main, info_name="headrace", **settings)
    parts.append(_block("headrace", main.get_help(context)))
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        child = click.Context(command, info_name=f"headrace {name}", **settings)
        parts.append(_block(f"headrace {name}", command.get_help(child)))
    return "\n".join(parts)


def _block(title: str, text: str) -> str:
    return f"## {title}\n\n```\n{text}\n```\n"


if __name__ == "__main__":
    TARGET.write_text(reference())
