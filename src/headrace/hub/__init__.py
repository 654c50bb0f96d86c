"""Models of the Hugging Face hub by name: file selection, download, cache, and headers by range requests.

`huggingface_hub` sends the requests, keeps the cache and draws the progress bars. It is imported on first use, so that
`--help` and `plan` start fast. This package never imports torch, never writes outside the hub's cache, and never loads
downloaded files.
"""

from headrace.hub.cache import CachedModel, Removal, cached_models, local_path, removal
from headrace.hub.download import pull
from headrace.hub.listing import Listing, list_repository
from headrace.hub.reference import Reference, parse_reference
from headrace.hub.remote import RemoteModel, remote_sources
from headrace.hub.selection import RemoteFile, Selection, files_needed

__all__ = [
    "CachedModel",
    "Listing",
    "Reference",
    "RemoteFile",
    "RemoteModel",
    "Removal",
    "Selection",
    "cached_models",
    "files_needed",
    "list_repository",
    "local_path",
    "parse_reference",
    "pull",
    "remote_sources",
    "removal",
]
