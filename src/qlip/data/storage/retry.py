"""Requests to remote storage: which failures are retried, and the errors of those that are not, or fail for good."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from qlip.data.storage.address import public_address, without_secrets
from qlip.errors import QLIPError, require

Result = TypeVar("Result")

FIRST_WAIT = 0.5  # seconds
NOT_RETRYABLE = (501, 505)
"""HTTP status codes that are never retried."""


class StorageError(QLIPError):
    """Remote storage that kept failing, or a stale index: not the fault of a sample, so none is skipped for it."""


class MissingError(QLIPError):
    """A file that does not exist."""


class DeniedError(QLIPError):
    """A file that may not be read, which is seldom the fault of one file."""


class NoCredentialsError(DeniedError, StorageError):
    """Credentials are missing, so that nothing in the storage can be read."""


class RetryPolicy(BaseModel):
    """Number of tries of a request to remote storage, and the waits between them.

    Waits are random, up to a bound that doubles from half a second (exponential back-off with full jitter), so that a
    thousand workers do not retry at the same moment.

    Attributes:
        tries: of one request, including the first.
        timeout: seconds until a request without an answer counts as failed.
        longest_wait: maximum seconds between two tries.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tries: int = Field(default=8, ge=1)
    timeout: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    longest_wait: float = Field(default=30.0, ge=0, allow_inf_nan=False)


class _Counter:
    """Count of retries in this process; loader workers report theirs with each batch."""

    def __init__(self) -> None:
        self._count, self._lock = 0, threading.Lock()

    def add(self) -> None:
        with self._lock:
            self._count += 1

    def take(self) -> int:
        """Return the count since the last call, and reset it."""
        with self._lock:
            count, self._count = self._count, 0
            return count


RETRIES = _Counter()


def retrying(request: Callable[[], Result], policy: RetryPolicy, address: str) -> Result:
    """The result of a request, made again while it fails in a way that may pass.

    Args:
        request: makes it.
        policy: number of tries and waits.
        address: of the file, for errors.

    Raises:
        StorageError: it failed as often as the policy allows.
        QLIPError: it failed in a way that a retry does not change, see `final_error`.
    """
    tenacity, began = require("tenacity", extra="remote"), time.monotonic()
    attempts = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(policy.tries),
        wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT, max=policy.longest_wait),
        retry=tenacity.retry_if_exception(_may_pass),
        before_sleep=lambda state: RETRIES.add(),
        reraise=True,
    )
    try:
        result: Result = attempts(request)
        return result
    except QLIPError:
        raise
    except _failures() as error:
        cause = _unwrapped(error)
        raise final_error(address, cause, policy, time.monotonic() - began) from cause


def unreadable(address: str | Path, error: OSError) -> QLIPError:
    """The error to raise for a local file that cannot be read."""
    line = f"{address}: {error.strerror or error}"
    if isinstance(error, PermissionError):
        return DeniedError(f"{line}; give this user the right to read it")
    return (MissingError if isinstance(error, FileNotFoundError) else QLIPError)(f"{line}; check the path")


def _failures() -> tuple[type[BaseException], ...]:
    """Exceptions of storage clients: OSError, and the base classes of those clients that are loaded."""
    names = {
        "aiohttp": ("ClientError",),
        "botocore.exceptions": ("BotoCoreError", "ClientError"),
        "gcsfs.retry": ("HttpError",),
        "google.auth.exceptions": ("GoogleAuthError",),
        "google.api_core.exceptions": ("GoogleAPIError",),
    }
    loaded = [
        getattr(sys.modules[module], name) for module, found in names.items() if module in sys.modules for name in found
    ]
    return (OSError, EOFError, NotImplementedError, ValueError, *loaded)  # ValueError: a malformed address


def _unwrapped(error: BaseException) -> BaseException:
    """The cause of an error, where fsspec hides it: it turns every HTTP error of a size request into "not found"."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or cause is None or isinstance(cause, FileNotFoundError):
        return error
    of_http = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
    return cause if of_http else error


def _status(error: BaseException) -> int | None:
    for name in ("status", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int | str) and str(value).isdigit():
            return int(value)
    return None


def _may_pass(error: BaseException) -> bool:
    """True if an equal request may succeed later."""
    error = _unwrapped(error)
    if isinstance(error, QLIPError) or not isinstance(error, _failures()):
        return False
    if isinstance(
        error,
        FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError | NotImplementedError | ValueError,
    ):
        return False
    status = _status(error)
    if status is not None:
        return (status >= 500 and status not in NOT_RETRYABLE) or status in (408, 425, 429)
    return not any(word in type(error).__name__ for word in ("Credential", "Auth", "InvalidURL"))


def final_error(address: str, error: BaseException, retry: RetryPolicy, seconds: float) -> QLIPError:
    """The one-line error of a request that failed for good; it holds no password and no signature."""
    address, status = public_address(address), _status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return MissingError(f"{address}: no such file; check the address")
    if isinstance(error, PermissionError) or status in (401, 403):
        return DeniedError(f"{address}: no permission ({one_line(error)}); check the credentials for this store")
    if any(word in type(error).__name__ for word in ("Credential", "Auth")):
        remedy = "set them as the tools of this storage expect them"
        return NoCredentialsError(f"{address}: no credentials ({one_line(error)}); {remedy}")
    if not _may_pass(error):
        return QLIPError(f"{address}: {one_line(error)}; check the address")
    reason = f"no answer within {retry.timeout:g} s" if isinstance(error, TimeoutError) else one_line(error)
    return StorageError(
        f"{address}: gave up after {retry.tries} tries in {seconds:.0f} s, the last: {reason}; check the storage"
        " and the network, then start again"
    )


def one_line(error: BaseException) -> str:
    """The message of an error in one line, without passwords and signatures."""
    status, message = _status(error), getattr(error, "message", None)
    text = f"{status} {message}" if status is not None and message else str(error)
    return without_secrets(" ".join(text.split())) or type(error).__name__
