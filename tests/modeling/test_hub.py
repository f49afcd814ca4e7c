"""Errors of the Hub become one line that names the repository and the remedy."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from qlip import QLIPConfig, QLIPError, QLIPModel, QLIPProcessor
from qlip.modeling.hub import _TRANSPORT, hub_errors
from qlip.modeling.loading import LoadedModel
from tests.modeling.helpers import FIXTURE, small_config


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (LocalEntryNotFoundError("gone"), "not in the local cache, and cannot download without a network"),
        (OfflineModeIsEnabled("off"), "not in the local cache, and cannot download without a network"),
        (HFValidationError("no\nname"), "not a Hub id (no name); one looks like owner/name"),
        (OSError("two\nlines"), "cannot download (two lines); check the network and the token"),
        (_TRANSPORT("refused"), "cannot download (refused); check the network and the token"),
        (TimeoutError(), "cannot download (TimeoutError); check the network and the token"),
    ],
)
def test_hub_errors__one_line_with_the_remedy(error: Exception, said: str) -> None:
    with pytest.raises(QLIPError) as raised, hub_errors("me/model", "download"):
        raise error
    assert str(raised.value).startswith(f"me/model: {said}") and "\n" not in str(raised.value)


def test_push_to_hub__an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    nowhere = partial(HfApi, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr("qlip.modeling.checkpoint.HfApi", nowhere)
    with pytest.raises(QLIPError, match=r"^me/model: cannot upload") as error:
        QLIPProcessor.from_pretrained(FIXTURE).push_to_hub("me/model", token="hf_x")
    assert "\n" not in str(error.value)


def test_hub_errors__an_upload_has_no_cache() -> None:
    with pytest.raises(QLIPError, match="^me/model: cannot upload without a network"), hub_errors("me/model", "upload"):
        raise OfflineModeIsEnabled("off")


def test_hub_errors__other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), hub_errors("me/model", "download"):
        raise ZeroDivisionError


PREPARATION = {"preprocessor_config.json", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"}
WEIGHTS = {"config.json", "model.safetensors"}


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Names of the files of each upload; nothing leaves the machine."""
    uploads: list[set[str]] = []

    class Api:
        def __init__(self, token: str | None) -> None: ...

        def create_repo(self, repo_id: str, **options: Any) -> None: ...

        def upload_folder(self, *, repo_id: str, folder_path: str) -> str:
            uploads.append({path.name for path in Path(folder_path).iterdir()})
            return f"https://example.org/{repo_id}"

    monkeypatch.setattr("qlip.modeling.checkpoint.HfApi", Api)
    return uploads


def test_push_to_hub__has_all_that_a_checkpoint_needs(uploads: list[set[str]]) -> None:
    model, processor = QLIPModel.from_pretrained("bundled"), QLIPProcessor.from_pretrained("bundled")
    assert model.push_to_hub("me/model") == "https://example.org/me/model"
    processor.push_to_hub("me/model")
    LoadedModel(model, processor, "bundled").push_to_hub("me/model")
    assert uploads == [WEIGHTS | PREPARATION, PREPARATION, WEIGHTS | PREPARATION]


def test_push_to_hub__a_random_model_needs_a_processor(uploads: list[set[str]]) -> None:
    model = QLIPModel(QLIPConfig.from_dict(small_config()))
    with pytest.raises(QLIPError, match="processor="):
        model.push_to_hub("me/model")
    model.push_to_hub("me/model", processor=QLIPProcessor.from_pretrained(FIXTURE))
    assert uploads == [WEIGHTS | {"preprocessor_config.json"}]
