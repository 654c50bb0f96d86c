"""Errors of the hub in headrace's form: repository, the hub's response, hint.

The hub's own messages name URLs and Python options; users need the next command.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from headrace.errors import HubError
from headrace.hub.reference import Reference
from headrace.units import seconds

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

LOGIN = "`hf auth login`, or set HF_TOKEN"
RESUME = "the same command goes on where it was"


@contextmanager
def explained(reference: Reference) -> Iterator[None]:
    """Turn exceptions of `huggingface_hub` into a `HubError`."""
    import httpx2
    from huggingface_hub.errors import RevisionResolutionError

    try:
        yield
    except (httpx2.HTTPError, OSError, ValueError, RevisionResolutionError) as error:
        raise _explanation(reference, _root(error)) from error


def _root(error: Exception) -> Exception:
    """The hub's own error, under the library's `not in the cache either`."""
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionResolutionError

    cause = error.__cause__
    wraps = isinstance(error, LocalEntryNotFoundError | RevisionResolutionError)
    return cause if wraps and isinstance(cause, Exception) else error


def _explanation(reference: Reference, error: Exception) -> HubError:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return _http_error(reference, error)
    if isinstance(error, OfflineModeIsEnabled):
        return offline(reference)
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
        return HubError(
            f"cannot reach {endpoint()} for {reference.repo}: {error}",
            hint=f"check the network and HF_ENDPOINT; {RESUME}",
        )
    if isinstance(error, httpx2.TransportError):
        return HubError(
            f"the connection broke while reading {reference.repo}: {error or type(error).__name__}", hint=RESUME
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return HubError(f"the disk is full while {reference.repo} is written", hint=f"free disk space; {RESUME}")
    if isinstance(error, OSError) and error.errno is not None:
        return HubError(f"cannot keep {reference.repo}: {error}", hint="check the folder that HF_HOME names")
    first = str(error).strip().splitlines() or [type(error).__name__]
    return HubError(f"{endpoint()} does not answer as the hub does: {first[0]}", hint="check HF_ENDPOINT and proxies")


def _http_error(reference: Reference, error: "HfHubHTTPError") -> HubError:
    from huggingface_hub import errors

    repo, status = reference.repo, error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        hint = f"accept the conditions at {endpoint()}/{repo}, then {LOGIN}"
        return HubError(f"{repo} is gated: its owner grants access ({status})", hint=hint)
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = f"check the name; a private repository needs a token: {LOGIN}"
        return HubError(f"there is no model {repo} at {endpoint()} ({status})", hint=hint)
    if isinstance(error, errors.RevisionNotFoundError):
        hint = "give a branch, a tag or a whole commit hash after the @"
        return HubError(f"{repo} has no revision `{reference.revision or 'main'}`", hint=hint)
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return HubError(f"a file of {repo} is gone ({status}): {error.response.url.path}", hint="start again")
    if status in (401, 403):
        return HubError(f"{endpoint()} refuses the token for {repo} ({status})", hint=f"make a new token, then {LOGIN}")
    if status == 404:
        return HubError(f"there is no model {repo} at {endpoint()} (404)", hint="check the name and HF_ENDPOINT")
    if status == 429:
        return HubError(f"{endpoint()} allows no more requests for now (429)", hint=_when(error))
    return HubError(f"{endpoint()} answers {status} for {repo}", hint=f"try again later; {RESUME}")


def _when(error: "HfHubHTTPError") -> str:
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = error.response.headers
    limit = parse_ratelimit_headers(headers)
    after = headers.get("Retry-After") or (str(limit.reset_in_seconds) if limit else "")
    when = f"in {seconds(int(after))}" if after.isdigit() else f"after {after}" if after else "in some minutes"
    return f"try again {when}; a token allows more: {LOGIN}"


def offline(reference: Reference) -> HubError:
    """Error for a model that is incomplete in the cache while the network is off."""
    return HubError(
        f"{reference} is not complete in the cache, and HF_HUB_OFFLINE keeps the network off",
        hint=f"HF_HUB_OFFLINE=0 headrace pull {reference}",
    )


def endpoint() -> str:
    """URL of the hub."""
    from huggingface_hub import constants

    return constants.ENDPOINT
