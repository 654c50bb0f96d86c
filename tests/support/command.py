"""The command `headrace`: in this process where only its words and results count, in another where the process counts."""

import os
import subprocess
import sys

from click.testing import CliRunner, Result

from headrace.cli import main

# Arguments that start it as another process.
COMMAND = [sys.executable, "-c", "from headrace.cli import main; main()"]


def headrace(*arguments: object, stdin: str = "", **environment: str) -> Result:
    """Run the command in this process; an error that it does not handle is raised.

    Args:
        arguments: its words.
        stdin: what it reads there.
        environment: environment variables beside those of this process.
    """
    return CliRunner().invoke(main, list(map(str, arguments)), input=stdin, env=environment, catch_exceptions=False)


def run_in_subprocess(*arguments: object, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in another process, as a user does. The arguments are those of `headrace`."""
    words = [*COMMAND, *map(str, arguments)]
    env = {**os.environ, **environment}
    return subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=120, env=env)
