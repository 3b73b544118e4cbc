"""Uploading an export to the Hugging Face hub, by the hub's own client."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssp_jax.errors import InputError, first_line

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def check_name(repository: str) -> None:
    """Raises InputError unless it may be the name of a repository."""
    if not _REPOSITORY.fullmatch(repository):
        raise InputError(f"--push={repository}: expected USER/NAME of a model on the hub")


def check_access(repository: str) -> None:
    """Raises InputError unless the hub answers and knows the user: before anything is written."""
    from huggingface_hub import HfApi

    with _reaching(repository):
        HfApi().whoami()


def upload(folder: Path, repository: str) -> str:
    """Uploads a folder as one commit; returns its address. A new repository is private."""
    from huggingface_hub import HfApi

    api = HfApi()
    with _reaching(repository):
        address = api.create_repo(repository, private=True, exist_ok=True)
        message = f"Upload {folder.name} of ssp_jax"
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    return str(address)


@contextmanager
def _reaching(repository: str) -> Iterator[None]:
    """Turns errors of the hub and of the network into one sentence."""
    from huggingface_hub import errors

    try:
        yield
    # OSError: of the hub, of files, and of being offline. HTTPError: of the network.
    except (OSError, ValueError, errors.HTTPError) as error:
        raise InputError(
            f"--push={repository}: expected the Hugging Face hub to take it "
            f"({first_line(error)}); `hf auth login` logs in"
        ) from None
