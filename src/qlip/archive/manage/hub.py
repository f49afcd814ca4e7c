"""Token datasets on the Hugging Face Hub."""

from __future__ import annotations

import os

from huggingface_hub import HfApi, snapshot_download

from qlip.archive.dataset.completeness import check_whole
from qlip.archive.dataset.layout import Layout
from qlip.archive.search.index import FOLDER
from qlip.data.storage.storage import is_remote
from qlip.errors import QLIPError
from qlip.modeling.hub import hub_errors

KIND = "dataset"
NOT_SENT = [".*", "**/.*", "*.part", f"{FOLDER}/*"]
"""Files that are not uploaded: temporary files, and the search index, which is built where it is used."""


def push(
    layout: Layout, repo_id: str, *, private: bool = False, allow_partial: bool = False, token: str | None = None
) -> str:
    """Upload a dataset's folder, except its search index; files that are uploaded already are not sent again.

    Args:
        layout: of a dataset on this machine.
        repo_id: "name/dataset"; created if absent.
        private: make a new repository private.
        allow_partial: upload a dataset that lacks parts, too.
        token: of the Hub; by default the one that `hf auth login` stored.

    Returns:
        The dataset's address on the Hub.

    Raises:
        QLIPError: no dataset, or the Hub refuses.
        PartialDatasetError: it lacks parts, or its run has not ended.
    """
    layout.read_info()
    if is_remote(layout.address):
        raise QLIPError(f"{layout.address}: the Hub takes folders of this machine; copy the dataset here first")
    check_whole(layout, layout.manifest(), allow_partial)
    api = HfApi(token=token)
    with hub_errors(repo_id, "upload"):
        address = str(api.create_repo(repo_id, repo_type=KIND, private=private, exist_ok=True))
        large = getattr(api, "upload_large_folder", None)  # huggingface_hub 1 and older; later, upload_folder is both
        send = large or api.upload_folder
        send(repo_id=repo_id, folder_path=layout.address, repo_type=KIND, ignore_patterns=NOT_SENT)
    return address


def pull(
    repo_id: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    **options: object,
) -> str:
    """Download a dataset, except a search index; files that are downloaded already are not fetched again.

    Args:
        repo_id: "name/dataset".
        folder: for the dataset; the Hub's cache by default.
        revision: branch, tag or commit.
        token: of the Hub.
        options: further arguments of `huggingface_hub.snapshot_download`.

    Returns:
        The dataset's folder; `TokenDataset` opens it.

    Raises:
        QLIPError: no such dataset, no network and none in the cache, or it is no token dataset.
    """
    with hub_errors(repo_id, "download"):
        where = snapshot_download(
            repo_id,
            repo_type=KIND,
            revision=revision,
            local_dir=folder,
            token=token,
            **{"ignore_patterns": [f"{FOLDER}/*"]} | options,  # type: ignore[call-overload]
        )
    Layout(str(where)).read_info()
    return str(where)
