"""Names of hub models as users type them: `org/repo`, `org/repo:file-or-quantisation`, `org/repo@revision:file`.

A path that exists is never a reference: callers check the disk first. Text that looks like a missing path (`./x`, `~/x`,
`folder/model.gguf`) must not cause a network request.
"""

import re
from dataclasses import dataclass

MAX_REPO_CHARACTERS = 96

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_REFERENCE = re.compile(rf"(?:hf://)?(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[^@:\s\\]+))?(?::(?P<file>[^:\\]+))?")
_FILES = (".gguf", ".safetensors", ".json", ".toml", ".bin")


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A repository of the hub, and perhaps one of its files (or a quantisation) and a branch, tag or commit."""

    repo: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}" + (f":{self.file}" if self.file else "")


def parse_reference(text: str) -> Reference | None:
    """The reference that a text names; None if it is none."""
    match = _REFERENCE.fullmatch(text)
    if match is None:
        return None
    repo, revision, file = match["repo"], match["revision"], match["file"]
    if len(repo) > MAX_REPO_CHARACTERS or "--" in repo or ".." in repo or repo.lower().endswith((*_FILES, ".git")):
        return None
    if _leaves(file) or _leaves(revision):
        return None
    return Reference(repo=repo, file=file, revision=revision)


def _leaves(path: str | None) -> bool:
    """True if a path leads out of its repository, or is blank."""
    return path is not None and (path.startswith("/") or ".." in path.split("/") or not path.strip())
