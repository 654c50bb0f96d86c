"""Headers of a model at the hub: a `Source` that implements `pread` by HTTP range requests.

Only requested blocks are fetched, and they are cached. While requests are consecutive, each fetches twice as many blocks as
the one before. If a server ignores the range, its body is not read: a header must not cost 40 GB.
"""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from headrace.checkpoint.source import Source
from headrace.errors import CheckpointError, HubError
from headrace.hub.errors import endpoint, explained
from headrace.hub.listing import Listing, list_repository
from headrace.hub.reference import Reference
from headrace.hub.selection import Selection, files_needed
from headrace.units import MIB

BLOCK_BYTES = MIB
MAX_READ_AHEAD = 8  # blocks in one request
MAX_BLOCKS = 128
RETRIES = 3
BUSY = (500, 502, 503, 504)

Fetch = Callable[[int, int], bytes]  # (first byte, count) to bytes


class RemoteSource:
    """A file of the hub. `fetch` returns a range of its bytes."""

    def __init__(self, path: str, size: int, fetch: Fetch):
        self.path = path
        self.size = size
        self._fetch = fetch
        self._blocks: dict[int, bytes] = {}
        self._next_block, self._run = 0, 1  # block after the last request; blocks per request

    def pread(self, count: int, offset: int) -> bytes:
        """See `Source.pread`. Raises `HubError`."""
        if offset >= self.size or count <= 0:
            return b""
        number, start = divmod(offset, BLOCK_BYTES)
        if number not in self._blocks:
            self._read(number)
        return self._blocks[number][start : start + count]

    def _read(self, number: int) -> None:
        self._run = min(2 * self._run, MAX_READ_AHEAD) if number == self._next_block and self._blocks else 1
        first = number * BLOCK_BYTES
        data = self._fetch(first, min(self._run * BLOCK_BYTES, self.size - first))
        if len(self._blocks) + self._run > MAX_BLOCKS:
            self._blocks.clear()
        for at in range(0, len(data), BLOCK_BYTES):
            self._blocks[number + at // BLOCK_BYTES] = data[at : at + BLOCK_BYTES]
        self._next_block = number + self._run

    def close(self) -> None:
        """Keep the blocks: the next caller that opens the file needs them."""


@dataclass(frozen=True, kw_only=True)
class RemoteModel:
    """A model at the hub: the path to open, and the function that opens it. `open_checkpoint` takes both."""

    path: str
    selection: Selection
    listing: Listing
    _sources: dict[str, RemoteSource] = field(compare=False, repr=False)

    def open_source(self, path: str) -> Source:
        """A file of the model by its path. Raises `CheckpointError` if the repository has none."""
        if path not in self._sources:
            missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            raise CheckpointError(f"cannot open {path}: it is not in the repository") from missing
        return self._sources[path]


def remote_sources(reference: Reference) -> RemoteModel:
    """The model as the hub lists it now, by one request. Later reads use the same commit.

    Raises `HubError`, and the errors of `files_needed`.
    """
    listing = list_repository(reference)
    selection = files_needed(listing.files, reference.file)
    at = f"@{reference.revision}" if reference.revision else ""
    root = f"hf://{reference.repo}{at}"
    sources = {
        f"{root}/{file.name}": RemoteSource(
            f"{root}/{file.name}", file.size, _fetcher(reference, listing.commit, file.name, file.size)
        )
        for file in listing.files
    }
    path = f"{root}/{selection.opened}" if selection.opened else root
    return RemoteModel(path=path, selection=selection, listing=listing, _sources=sources)


def _fetcher(reference: Reference, commit: str, name: str, size: int) -> Fetch:
    def fetch(first: int, count: int) -> bytes:
        import httpx2

        with explained(reference):
            for _ in range(RETRIES):
                with suppress(httpx2.TransportError):
                    return _range(reference, commit, name, size, first, count)
            return _range(reference, commit, name, size, first, count)

    return fetch


def _range(reference: Reference, commit: str, name: str, size: int, first: int, count: int) -> bytes:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url = hf_hub_url(reference.repo, name, revision=commit, endpoint=endpoint())
    wanted = {"Range": f"bytes={first}-{first + count - 1}", "Accept-Encoding": "identity"}
    with http_stream_backoff(
        "GET",
        url,
        headers={**build_hf_headers(), **wanted},
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_status_codes=BUSY,
        retry_on_exceptions=(),  # it cannot retry failures while the body is read
    ) as response:
        hf_raise_for_status(response)
        whole = first == 0 and count == size and response.status_code == 200
        given = response.headers.get("Content-Range", "")
        if not whole and (response.status_code != 206 or given != f"bytes {first}-{first + count - 1}/{size}"):
            raise HubError(
                f"{url} does not deliver bytes {first} to {first + count - 1} of {size} ({response.status_code} {given})",
                hint=f"headrace pull {reference} fetches the whole file",
            )
        data = bytearray()
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) > count:
                break
    if len(data) != count:
        raise HubError(f"{url} delivered {len(data)} bytes instead of {count}", hint="try again")
    return bytes(data)
