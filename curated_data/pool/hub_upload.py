"""Uploads to data sets of the Hugging Face Hub, `hf://datasets/OWNER/NAME`, by the client of the extra `hub`.

The server, and how it knows one, are the client's own: `HF_ENDPOINT`, and `HF_TOKEN` or `hf auth login`.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from curated_data.errors import CacheError, ConfigError, printable

log = logging.getLogger(__name__)

_URL = re.compile(
    r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<folder>[^@]*))?", re.ASCII
)
_CARD = "README.md"


class HubPlace(NamedTuple):
    """A folder of a data set on the Hub.

    Attributes:
        repo: OWNER/NAME.
        revision: a branch, tag or commit.
        folder: within the repository, "" for its top.
    """

    repo: str
    revision: str
    folder: str

    @property
    def url(self) -> str:
        """The URL that names it."""
        place = f"hf://datasets/{self.repo}" + (f"@{self.revision}" if self.revision != "main" else "")
        return f"{place}/{self.folder}" if self.folder else place

    def path(self, name: str) -> str:
        """Within the repository, the path of a file."""
        return f"{self.folder}/{name}" if self.folder else name


def hub_place(url: str) -> HubPlace:
    """What `hf://datasets/OWNER/NAME`, with `@REVISION` and a folder if need be, names.

    Raises:
        ConfigError: it is of another form.

    Examples:
        >>> from curated_data.pool.hub_upload import hub_place
        >>> hub_place("hf://datasets/me/birds@v1/train")
        HubPlace(repo='me/birds', revision='v1', folder='train')
    """
    found = _URL.fullmatch(url)
    folder = "" if found is None else (found["folder"] or "").strip("/")
    if found is None or ".." in folder.split("/"):
        raise ConfigError(
            f"{url}: no data set of the Hub; expected hf://datasets/OWNER/NAME, which @REVISION and a folder "
            "may follow"
        )
    return HubPlace(found["repo"], found["revision"] or "main", folder)


def hub_client() -> Any:
    """The client, `huggingface_hub.HfApi`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ConfigError(
            "hf:// needs the package huggingface_hub: pip install 'curated-data[hub]'"
        ) from error
    return HfApi(library_name="curated-data")


def upload(folder: Path, names: Sequence[str], place: HubPlace, *, message: str) -> str:
    """Write files to a data set as one commit: all of them appear, or none.

    A data set that does not exist yet is created, as a private one. An existing card is kept.

    Args:
        folder: on this machine.
        names: of files in it.
        place: where they go.
        message: of the commit.

    Returns:
        The URL of the commit.

    Raises:
        ConfigError: the client is not installed.
        CacheError: the Hub cannot be reached, or refuses.
    """
    api = hub_client()
    from huggingface_hub import CommitOperationAdd

    names = list(names)
    try:
        api.create_repo(place.repo, repo_type="dataset", private=True, exist_ok=True)
        kept = place.path(_CARD)
        if _CARD in names and api.file_exists(place.repo, kept, repo_type="dataset", revision=place.revision):
            log.warning("%s: has a %s, which stays; remove it there to have a new one", place.url, kept)
            names.remove(_CARD)
        made = api.create_commit(
            place.repo,
            [CommitOperationAdd(place.path(name), folder / name) for name in names],
            commit_message=message,
            repo_type="dataset",
            revision=place.revision,
        )
    except Exception as error:  # the client's, and those of what it sends with
        raise CacheError(
            f"{place.url}: cannot be written ({printable(error)}); check its name, HF_ENDPOINT, and that "
            "HF_TOKEN may write there"
        ) from error
    return str(made.commit_url)
