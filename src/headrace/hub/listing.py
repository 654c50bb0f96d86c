"""A repository at one commit, as the hub lists it: files with sizes and checksums. One request.

The hub, or a server in its place, is untrusted: commits and file names become parts of paths.
"""

import re
from dataclasses import dataclass
from typing import Any

from headrace.errors import HubError
from headrace.hub.errors import endpoint, explained
from headrace.hub.reference import Reference
from headrace.hub.selection import RemoteFile


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Files of a repository at one commit. Large files have a SHA-256."""

    commit: str
    files: tuple[RemoteFile, ...]
    sha256: dict[str, str]
    git_ids: dict[str, str]  # git's SHA-1 of the other files' contents
    license: str | None


def list_repository(reference: Reference) -> Listing:
    """Request the listing from the hub. Raises `HubError`."""
    from huggingface_hub import HfApi, constants

    with explained(reference):
        try:
            info = HfApi().model_info(
                reference.repo,
                revision=reference.revision,
                files_metadata=True,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            )
        except (KeyError, TypeError, AttributeError) as error:  # the response lacks a field that the library needs
            raise ValueError(f"its listing of {reference.repo} lacks {error}") from error
    commit, siblings = info.sha, info.siblings or []
    if (
        commit is None
        or not _COMMIT.fullmatch(commit)
        or any(type(file.size) is not int or file.size < 0 for file in siblings)
    ):
        raise HubError(
            f"{endpoint()} lists {reference.repo} without its commit or the sizes of its files",
            hint="HF_ENDPOINT may name a mirror that lacks them",
        )
    return Listing(
        commit=commit,
        files=tuple(RemoteFile(name=file.rfilename, size=file.size or 0) for file in siblings),
        sha256={file.rfilename: str(file.lfs.sha256) for file in siblings if file.lfs is not None},
        git_ids={file.rfilename: str(file.blob_id) for file in siblings if file.lfs is None},
        license=_license(info),
    )


_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)


def _license(info: Any) -> str | None:
    card = info.card_data.get("license") if info.card_data is not None else None
    tagged = [tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")]
    found = card if isinstance(card, str) else next(iter(tagged), None)
    return str(found) if found else None
