"""Downloads a model's missing files into the hub's cache; nothing is fetched twice.

`huggingface_hub` discards an interrupted download, which may be 40 GB. So its `http_get` writes to
`blobs/CHECKSUM.incomplete`, which stays; the next call requests the rest. A file gets its final name in the cache once length
and checksum match the hub's list. No response header becomes part of a path. Only files larger than the library fetches over
HTTP are left to `snapshot_download`.
"""

import glob
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from headrace.errors import HubError
from headrace.hub.cache import local_path, opened
from headrace.hub.errors import RESUME, endpoint, explained, offline
from headrace.hub.listing import Listing, list_repository
from headrace.hub.reference import Reference
from headrace.hub.selection import RemoteFile, files_needed
from headrace.text import printable
from headrace.units import gigabytes

RETRIES = 5
_LONGEST_NAME = 255  # max bytes of a path component
SPARE_BYTES = 1 << 24  # reserve for links, locks and lists

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class _Blob:
    """A file, its path in the cache and its expected hash."""

    file: RemoteFile
    sha256: str | None  # hash of a large file
    git_id: str | None  # hash of a small file; both are None if a mirror's list lacks them
    path: Path

    @property
    def partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.incomplete")

    @property
    def have(self) -> int:
        """Bytes left by an earlier attempt."""
        return self.partial.stat().st_size if self.partial.exists() else 0


def pull(reference: Reference, *, say: Say | None) -> str:
    """Fetch missing files and return the path to open: the .gguf file (its first part), or the folder.

    `say` receives messages on the choice and the downloads. With the network off, the cached model must be complete.

    Raises:
        HubError: the hub refuses, cannot be reached or breaks off, or the disk is too small.
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
    _check_names(selection.files)
    folder = _folder(reference) / "snapshots" / listing.commit
    path = opened(folder, selection)
    with explained(reference):
        missing = [file for file in selection.files if not _is_here(folder / file.name, file)]
        if missing or local_path(reference) != path:
            _fetch_and_link(reference, listing, missing, say)
            _write_ref(reference, listing.commit)
            _register_snapshot(reference, listing.commit, selection.files)
    _check_sizes(folder, selection.files)
    return path


def _check_names(files: Sequence[RemoteFile]) -> None:
    """Raise `HubError` for a name that is no path inside the snapshot."""
    for file in files:
        parts = file.name.split("/")
        sound = all(
            0 < len(part.encode(errors="replace")) <= _LONGEST_NAME and part not in (".", "..") for part in parts
        )
        if not sound or "\\" in file.name or printable(file.name, keep="") != file.name:
            raise HubError(
                f"the hub lists a file of the name {printable(file.name, keep='')!r}, which cannot be kept",
                hint="choose another file, or check what HF_ENDPOINT names",
            )


def _is_here(path: Path, file: RemoteFile) -> bool:
    """True if the snapshot holds the file. A file of another length is deleted, to be fetched again."""
    if not path.is_file():
        return False
    if path.stat().st_size == file.size:
        return True
    blob = path.resolve()
    path.unlink()
    if blob.parent.name == "blobs":
        blob.unlink(missing_ok=True)
    return False


def _folder(reference: Reference) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    return cache / repo_folder_name(repo_id=reference.repo, repo_type="model")


def _fetch_and_link(reference: Reference, listing: Listing, missing: Sequence[RemoteFile], say: Say) -> None:
    """Fetch and link the missing files, if the disk has space for all."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    blobs = [_blob(reference, listing, file) for file in missing if file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE]
    present = sum(blob.file.size if blob.path.exists() else min(blob.have, blob.file.size) for blob in blobs)
    _check_disk_space(reference, sum(file.size for file in missing) - present)
    large = [blob for blob in blobs if blob.sha256 is not None and not blob.path.exists()]
    for blob in blobs:
        if blob in large:
            rest = f", of which {gigabytes(blob.have)} are here" if blob.have else ""
            say(
                f"fetching {blob.file.name} ({large.index(blob) + 1} of {len(large)}), {gigabytes(blob.file.size)}{rest}"
            )
        with nullcontext() if blob in large else disable_progress_bars():
            _complete(reference, listing.commit, blob, say)
        _link(_folder(reference) / "snapshots" / listing.commit / blob.file.name, blob.path)


def _blob(reference: Reference, listing: Listing, file: RemoteFile) -> _Blob:
    sha256, git_id = listing.sha256.get(file.name, ""), listing.git_ids.get(file.name, "")
    large = sha256 if _is_hash(sha256, 64) else None
    small = git_id if _is_hash(git_id, 40) else None
    name = large or small or hashlib.sha1(f"{listing.commit}/{file.name}".encode()).hexdigest()
    return _Blob(file=file, sha256=large, git_id=small, path=_folder(reference) / "blobs" / name)


def _is_hash(text: str, digits: int) -> bool:
    return len(text) == digits and set(text) <= set("0123456789abcdef")


def _link(link: Path, blob: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    partial = link.with_name(f"{link.name}.{os.getpid()}-{threading.get_ident()}.partial")
    partial.symlink_to(os.path.relpath(blob, link.parent))
    partial.replace(link)  # at once: another process may link the same file


def _write_ref(reference: Reference, commit: str) -> None:
    """Record the commit of the branch, as the library does."""
    if reference.revision == commit:
        return
    refs = _folder(reference) / "refs"
    target = refs / (reference.revision or "main")
    if not target.resolve().is_relative_to(refs.resolve()):
        raise HubError(f"`{reference.revision}` is no name of a revision", hint="give a branch, a tag or a commit")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(commit)


def _check_disk_space(reference: Reference, needed: int) -> None:
    folder = next(path for path in _folder(reference).parents if path.exists())
    free = shutil.disk_usage(folder).free
    if needed and needed + SPARE_BYTES > free:
        raise HubError(
            f"{reference} needs {gigabytes(needed)} more, {folder} has {gigabytes(free)} free",
            hint="free disk space (`headrace list`, `headrace rm`), or set HF_HOME to a folder on another disk",
        )


def _complete(reference: Reference, commit: str, blob: _Blob, say: Say) -> None:
    """Fetch the rest of a file, under the library's own lock for it."""
    from huggingface_hub.utils import WeakFileLock

    folder = _folder(reference)
    lock = folder.parent / ".locks" / folder.name / f"{blob.path.name}.lock"
    # The snapshot's folder too: without it the library's scan takes the repository for damaged and cannot delete it.
    for path in (blob.path.parent, lock.parent, folder / "snapshots" / commit):
        path.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.path.exists():
            return
        if blob.have > blob.file.size:
            blob.partial.unlink()
        if blob.file.size:
            _download(reference, commit, blob)
        else:
            blob.partial.touch()
        if blob.sha256 is not None:
            say(f"comparing the SHA-256 of {blob.file.name}")
        _check_content(blob)
        blob.partial.replace(blob.path)


def _download(reference: Reference, commit: str, blob: _Blob) -> None:
    """Fetch with retries: `http_get` itself retries after most failures, but not after a reset connection."""
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
    if blob.have != blob.file.size:
        raise _differs(blob, f"{blob.have} bytes came instead of {blob.file.size}")
    kind, expected = ("sha256", blob.sha256) if blob.sha256 is not None else ("sha1", blob.git_id)
    if expected is None:
        return
    hashed = hashlib.new(kind, b"" if blob.sha256 is not None else b"blob %d\0" % blob.file.size)
    with blob.partial.open("rb") as file:
        while part := file.read(1 << 20):
            hashed.update(part)
    if hashed.hexdigest() != expected:
        name = "SHA-256" if blob.sha256 is not None else "git id"
        raise _differs(blob, f"its {name} begins {hashed.hexdigest()[:12]} instead of {expected[:12]}")


def _differs(blob: _Blob, how: str) -> HubError:
    """Delete the unusable partial file, and return the error."""
    blob.partial.unlink(missing_ok=True)
    return HubError(
        f"{blob.file.name} is not what the hub lists: {how}",
        hint="what came was deleted; try again, and look for a proxy that changes files if it stays so",
    )


def _register_snapshot(reference: Reference, commit: str, files: Sequence[RemoteFile]) -> None:
    """Let the library fetch the rest and store the listing. Progress bars only for large files."""
    from huggingface_hub import ResolvedRevision, constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    revision = ResolvedRevision(resolved=commit, initial=reference.revision, repo_id=reference.repo)
    long = any(file.size > constants.MAX_HTTP_DOWNLOAD_SIZE for file in files)
    with nullcontext() if long else disable_progress_bars():
        snapshot_download(reference.repo, revision=revision, allow_patterns=[glob.escape(file.name) for file in files])


def _check_sizes(folder: Path, files: Sequence[RemoteFile]) -> None:
    for file in files:
        path = folder / file.name
        if not _is_here(path, file):
            raise HubError(
                f"{path} does not have the {file.size} bytes that the hub lists",
                hint=f"what came was deleted; {RESUME}",
            )
