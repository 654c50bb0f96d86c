"""Models in the hub's cache: completeness, path, size and removal. No network.

The cache is `huggingface_hub`'s, shared with every program that uses it. Only the library's strategy deletes from it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.errors import HeadraceError, HubError
from headrace.hub.errors import explained
from headrace.hub.reference import Reference
from headrace.hub.selection import RemoteFile, Selection, choose_gguf, files_needed, gguf_models

if TYPE_CHECKING:
    from huggingface_hub import CachedFileInfo, CachedRepoInfo, CachedRevisionInfo, DeleteCacheStrategy, HFCacheInfo


@dataclass(frozen=True, kw_only=True)
class CachedModel:
    """A model that can be opened from the cache."""

    name: str
    repo: str
    format: str
    files: int
    nbytes: int
    last_used_s: float  # seconds since 1970
    path: str


@dataclass(frozen=True, kw_only=True)
class Removal:
    """A planned deletion, and the bytes that it frees."""

    what: str
    nbytes: int
    strategy: "DeleteCacheStrategy"

    def execute(self) -> None:
        """Delete it."""
        self.strategy.execute()


def local_path(reference: Reference) -> str | None:
    """Path to open if the cache holds all needed files, else None. Sends no request."""
    folder = _snapshot(reference)
    if folder is None:
        return None
    try:
        selection = files_needed(_listed(reference) or _files_in(folder), reference.file)
    except HeadraceError:
        return None
    if not all((folder / file.name).is_file() for file in selection.files):
        return None
    return opened(folder, selection)


def opened(folder: Path, selection: Selection) -> str:
    """Path to open of a selection in this folder."""
    return str(folder / selection.opened) if selection.opened else str(folder)


def _snapshot(reference: Reference) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    with explained(reference):
        try:
            return Path(snapshot_download(reference.repo, revision=reference.revision, local_files_only=True))
        except IncompleteSnapshotError as partial:  # incomplete as a whole repository; a part suffices
            return Path(partial.snapshot_path)
        except LocalEntryNotFoundError:
            return None


def _listed(reference: Reference) -> list[RemoteFile]:
    """All files of the repository, if an earlier download listed them."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(reference.repo, revision=reference.revision)
    except CachedRepoTreeNotFoundError:
        return []
    return [RemoteFile(name=file.path, size=file.size) for file in tree]


def _files_in(folder: Path) -> list[RemoteFile]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return [RemoteFile(name=path.relative_to(folder).as_posix(), size=path.stat().st_size) for path in found]


def cached_models() -> list[CachedModel]:
    """Every complete model in the cache, by name."""
    cache = _scan()
    if cache is None:
        return []
    pairs = [(repo, revision) for repo in cache.repos if repo.repo_type == "model" for revision in repo.revisions]
    models = [model for repo, revision in pairs for model in _models(repo, revision)]
    return sorted(models, key=lambda model: model.name)


def _scan() -> "HFCacheInfo | None":
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir()
    except CacheNotFound:
        return None


def _models(repo: "CachedRepoInfo", revision: "CachedRevisionInfo") -> list[CachedModel]:
    at = (
        repo.repo_id
        if "main" in revision.refs
        else f"{repo.repo_id}@{min(revision.refs, default=revision.commit_hash)}"
    )
    cached, files = _files_of(revision)
    models = []
    for wanted in [None, *gguf_models(files)]:
        try:
            selection = files_needed(files, wanted)
        except HeadraceError:
            continue
        if wanted is not None or selection.format == "safetensors":
            models.append(
                _cached_model(at if wanted is None else f"{at}:{wanted}", repo.repo_id, selection, cached, revision)
            )
    return models


def _files_of(revision: "CachedRevisionInfo") -> "tuple[dict[str, CachedFileInfo], list[RemoteFile]]":
    cached = {file.file_path.relative_to(revision.snapshot_path).as_posix(): file for file in revision.files}
    return cached, [RemoteFile(name=name, size=file.size_on_disk) for name, file in cached.items()]


def _cached_model(
    name: str, repo: str, selection: Selection, cached: "dict[str, CachedFileInfo]", revision: "CachedRevisionInfo"
) -> CachedModel:
    return CachedModel(
        name=name,
        repo=repo,
        format=selection.format,
        files=len(selection.files),
        nbytes=selection.nbytes,
        last_used_s=max(cached[file.name].blob_last_accessed for file in selection.files),
        path=opened(revision.snapshot_path, selection),
    )


def removal(reference: Reference) -> Removal:
    """Plan the removal of a repository, a revision or a GGUF model of it. Nothing is deleted yet.

    Raises:
        HubError: it is not in the cache.
        UsageError: several files match.
    """
    cache = _scan()
    repos = cache.repos if cache is not None else ()
    repo = next((repo for repo in repos if repo.repo_id == reference.repo and repo.repo_type == "model"), None)
    revisions = [] if repo is None else _matching_revisions(repo, reference)
    if cache is None or not revisions:
        raise HubError(f"{reference} is not in the cache", hint="`headrace list` shows what is")
    if reference.file is None:
        strategy = cache.delete_revisions(*(revision.commit_hash for revision in revisions))
    else:
        strategy = cache.delete_files(*_chosen(revisions, reference))
    # Partial downloads are deleted with the repository; the library does not count them.
    partial_files = [
        file for file in cache.incomplete_files if any(file.file_path.is_relative_to(repo) for repo in strategy.repos)
    ]
    nbytes = strategy.expected_freed_size + sum(file.size_on_disk for file in partial_files)
    return Removal(what=str(reference), nbytes=nbytes, strategy=strategy)


def _matching_revisions(repo: "CachedRepoInfo", reference: Reference) -> "list[CachedRevisionInfo]":
    wanted = reference.revision
    return [r for r in repo.revisions if wanted is None or wanted in r.refs or wanted == r.commit_hash]


def _chosen(revisions: "list[CachedRevisionInfo]", reference: Reference) -> "list[CachedFileInfo]":
    chosen: list[CachedFileInfo] = []
    refused: HeadraceError | None = None
    for revision in revisions:
        cached, files = _files_of(revision)
        try:
            parts, _ = choose_gguf(files, reference.file)
        except HeadraceError as error:
            refused = error
            continue
        chosen += [cached[file.name] for file in parts]
    if not chosen and refused is not None:
        raise refused
    return chosen
