"""Fetching what is missing of a model into the hub's cache, so that nothing is fetched twice.

`huggingface_hub` keeps no part of a file whose download was interrupted. Of a model of 40 GB that is too much to lose, so
large files with a known SHA-256 are fetched by its `http_get` into `blobs/SHA.incomplete`, which stays; the next call asks
for the rest. The checksum is compared before a file gets the name under which the cache looks for it. Small files, files
larger than the library fetches over HTTP, and the links of the snapshot are left to `snapshot_download`.
"""

import glob
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from headrace.errors import HubError
from headrace.hub.cache import local_path, opened
from headrace.hub.listing import Listing, list_repository
from headrace.hub.reference import Reference
from headrace.hub.refusal import RESUME, endpoint, explained, offline
from headrace.hub.selection import RemoteFile, files_needed
from headrace.units import gigabytes

RETRIES = 5
SPARE_BYTES = 1 << 24  # room for links, locks and lists

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class _Blob:
    """A large file: where it will lie in the cache, and what it must hash to."""

    file: RemoteFile
    sha256: str
    path: Path

    @property
    def partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.incomplete")

    @property
    def have(self) -> int:
        """Bytes that an earlier attempt left."""
        return self.partial.stat().st_size if self.partial.exists() else 0


def pull(reference: Reference, *, say: Say | None) -> str:
    """Fetch what is missing; the path to open: the .gguf file (its first part), or the folder.

    `say` is told what is chosen and fetched. Where the network is switched off, what is cached must be complete.

    Raises:
        HubError: the hub refuses, cannot be reached, breaks off, or there is no room.
        UsageError, CheckpointError, UnsupportedError: as `files_needed`.
    """
    from huggingface_hub import constants

    say = say or (lambda _: None)
    if constants.is_offline_mode():
        path = local_path(reference)
        if path is None:
            raise offline(reference)
        return path
    listing = list_repository(reference)
    selection = files_needed(listing.files, reference.file)
    say(f"{reference.repo}: {selection.reason}, {gigabytes(selection.nbytes)}")
    folder = _folder(reference) / "snapshots" / listing.commit
    path = opened(folder, selection)
    if local_path(reference) != path:
        with explained(reference):
            _bring(reference, listing, [file for file in selection.files if not (folder / file.name).is_file()], say)
            _link(reference, listing.commit, selection.files)
    _check_sizes(folder, selection.files)
    return path


def _folder(reference: Reference) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    return cache / repo_folder_name(repo_id=reference.repo, repo_type="model")


def _bring(reference: Reference, listing: Listing, missing: Sequence[RemoteFile], say: Say) -> None:
    """Fetch the large files among them, and see that there is room for all."""
    from huggingface_hub import HfApi

    blobs = [blob for file in missing if (blob := _blob(reference, listing, file))]
    held = sum(blob.file.size if blob.path.exists() else min(blob.have, blob.file.size) for blob in blobs)
    _check_room(reference, sum(file.size for file in missing) - held)
    HfApi().resolve_revision(reference.repo, revision=reference.revision)  # notes which commit the branch is at
    blobs = [blob for blob in blobs if not blob.path.exists()]
    for number, blob in enumerate(blobs, 1):
        rest = f", of which {gigabytes(blob.have)} are here" if blob.have else ""
        say(f"fetching {blob.file.name} ({number} of {len(blobs)}), {gigabytes(blob.file.size)}{rest}")
        _complete(reference, listing.commit, blob, say)


def _blob(reference: Reference, listing: Listing, file: RemoteFile) -> _Blob | None:
    from huggingface_hub import constants

    sha256 = listing.sha256.get(file.name, "")
    known = len(sha256) == 64 and set(sha256) <= set("0123456789abcdef")
    if not known or not 0 < file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
        return None
    return _Blob(file=file, sha256=sha256, path=_folder(reference) / "blobs" / sha256)


def _check_room(reference: Reference, needed: int) -> None:
    folder = next(path for path in _folder(reference).parents if path.exists())
    free = shutil.disk_usage(folder).free
    if needed and needed + SPARE_BYTES > free:
        raise HubError(
            f"{reference} needs {gigabytes(needed)} more, {folder} has {gigabytes(free)} free",
            hint="make room (`headrace list`, `headrace rm`), or set HF_HOME to a folder on another disk",
        )


def _complete(reference: Reference, commit: str, blob: _Blob, say: Say) -> None:
    """Fetch the rest of a file, under the lock that the library itself takes for it."""
    from huggingface_hub.utils import WeakFileLock

    folder = _folder(reference)
    lock = folder.parent / ".locks" / folder.name / f"{blob.sha256}.lock"
    # The snapshot's folder too: without one the library's scan takes the repository for damaged and cannot delete it.
    for path in (blob.path.parent, lock.parent, folder / "snapshots" / commit):
        path.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.path.exists():
            return
        if blob.have > blob.file.size:
            blob.partial.unlink()
        _download(reference, commit, blob)
        say(f"comparing the SHA-256 of {blob.file.name}")
        _check_content(blob)
        blob.partial.replace(blob.path)


def _download(reference: Reference, commit: str, blob: _Blob) -> None:
    """`http_get` tries again by itself after most failures, but not after a reset connection."""
    import httpx2
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(reference.repo, blob.file.name, revision=commit, endpoint=endpoint())
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    tries = 0
    while True:
        have = blob.have
        try:
            with blob.partial.open("ab") as file:
                http_get(
                    url,
                    file,
                    resume_size=have,
                    headers=headers,
                    expected_size=blob.file.size,
                    displayed_filename=blob.file.name,
                )
            return
        except httpx2.NetworkError:
            tries = 0 if blob.have > have else tries + 1
            if tries >= RETRIES:
                raise
        except OSError as error:
            if error.errno is None and not isinstance(error, httpx2.HTTPError):
                raise _differs(blob, f"{blob.have} bytes came instead of {blob.file.size}") from error
            raise


def _check_content(blob: _Blob) -> None:
    with blob.partial.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != blob.sha256:
        raise _differs(blob, f"its SHA-256 begins {found[:12]} instead of {blob.sha256[:12]}")


def _differs(blob: _Blob, how: str) -> HubError:
    """Nothing can be made of the partial file: it goes."""
    blob.partial.unlink(missing_ok=True)
    return HubError(
        f"{blob.file.name} is not what the hub lists: {how}",
        hint="what came was deleted; try again, and look for a proxy that changes files if it stays so",
    )


def _link(reference: Reference, commit: str, files: Sequence[RemoteFile]) -> None:
    """Let the library fetch what is left, link what lies there, and keep the listing. Bars only for what takes long."""
    from huggingface_hub import ResolvedRevision, constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    revision = ResolvedRevision(resolved=commit, initial=reference.revision, repo_id=reference.repo)
    long = any(file.size > constants.MAX_HTTP_DOWNLOAD_SIZE for file in files)
    with nullcontext() if long else disable_progress_bars():
        snapshot_download(reference.repo, revision=revision, allow_patterns=[glob.escape(file.name) for file in files])


def _check_sizes(folder: Path, files: Sequence[RemoteFile]) -> None:
    for file in files:
        size = os.path.getsize(folder / file.name)
        if size != file.size:
            raise HubError(
                f"{folder / file.name} has {size} bytes, the hub lists {file.size}",
                hint=f"delete it; {RESUME}",
            )
