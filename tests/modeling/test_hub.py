"""Errors of the Hub become one line that names the repository and the remedy."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from qlip import QLIPError
from qlip.modeling.hub import hub_errors


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (LocalEntryNotFoundError("gone"), "not in the local cache, and cannot download without a network"),
        (OfflineModeIsEnabled("off"), "not in the local cache, and cannot download without a network"),
        (HFValidationError("no\nname"), "not a Hub id (no name); one looks like owner/name"),
        (OSError("two\nlines"), "cannot download (two lines); check the network and the token"),
        (TimeoutError(), "cannot download (TimeoutError); check the network and the token"),
    ],
)
def test_hub_errors__one_line_with_the_remedy(error: Exception, said: str) -> None:
    with pytest.raises(QLIPError) as raised, hub_errors("me/model", "download"):
        raise error
    assert str(raised.value).startswith(f"me/model: {said}") and "\n" not in str(raised.value)


def test_hub_errors__an_upload_has_no_cache() -> None:
    with pytest.raises(QLIPError, match="^me/model: cannot upload without a network"), hub_errors("me/model", "upload"):
        raise OfflineModeIsEnabled("off")


def test_hub_errors__other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), hub_errors("me/model", "download"):
        raise ZeroDivisionError
