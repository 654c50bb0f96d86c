"""Models of the Hugging Face hub by name: which files are needed, fetching them, where they lie, reading headers from afar.

`huggingface_hub` speaks to the hub, keeps the cache and draws the bars; it is imported when something is asked of it, so
that `--help` and `plan` start fast. This room never imports torch, never writes outside of the hub's cache, and never
loads what it fetches.
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
