"""Transfers from and to the Hugging Face Hub, whose errors become one line with a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qlip.errors import QLIPError

_TRANSPORT: type[Exception] = next(
    base
    for base in HfHubHTTPError.__mro__
    if issubclass(base, Exception) and base.__name__ in ("HTTPError", "RequestException")
)
"""Base of connection errors of the package that huggingface_hub uses: httpx, before its version 1 requests."""


@contextmanager
def hub_errors(repo_id: str, action: Literal["download", "upload"]) -> Iterator[None]:
    """Turn the Hub's errors inside the block into a `QLIPError` that names the repository.

    Args:
        repo_id: repository, "owner/name".
        action: named in the error.
    """
    try:
        yield
    except GatedRepoError:
        why = "access is restricted; accept its terms on the Hub and give a token"
    except RevisionNotFoundError:
        why = "the Hub has no such revision; name a branch, a tag or a commit"
    except RepositoryNotFoundError:
        why = "no such repository on the Hub, or a private one; check the name and the token"
    except HFValidationError as error:
        why = f"not a Hub id ({_one_line(error)}); one looks like owner/name"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        cached = "not in the local cache, and " if action == "download" else ""
        why = f"{cached}cannot {action} without a network; go online and try again"
    except (_TRANSPORT, OSError) as error:
        why = f"cannot {action} ({_one_line(error) or type(error).__name__}); check the network and the token"
    else:
        return
    raise QLIPError(f"{repo_id}: {why}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
