"""Uploads to the Hugging Face Hub: shown first, and sent in one commit where that is wanted."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from flatdepth.errors import UserError

CARD = "README.md"
NOT_SENT = "\nNothing was sent; add --yes to send it."
TOKENS = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """Files for a repository.

    Attributes:
        repo: its id, OWNER/NAME.
        kind: of what it is a repository.
        files: name in it -> local file, or the bytes themselves; ``CARD`` is bytes.
        private: whether it is made one that only its owner sees.

    Raises:
        UserError: no repository can have that id.
    """

    repo: str
    kind: Literal["model", "dataset"]
    files: Mapping[str, Path | bytes]
    private: bool

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo)
            known = self.repo.count("/") == 1
        except HFValidationError:
            known = False
        if not known:
            raise UserError(f"{self.repo}: expected a repository of the Hub as in OWNER/NAME")

    def __str__(self) -> str:
        """The files with their sizes, the whole card, and what is called to send them."""
        sizes = {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }
        rows = (f"  {size:>15,}  {name}" for name, size in sizes.items())
        card = self.files[CARD]
        assert isinstance(card, bytes)
        seen = "private" if self.private else "public"
        return (
            f"{constants.ENDPOINT}: {seen} {self.kind} {self.repo}, {sum(sizes.values()):,} bytes\n"
            + "\n".join(rows)
            + f"\n\n{card.decode()}\nCalls: whoami, create_repo (if there is none), "
            f"{self.kind}_info, create_commit of {len(sizes)} files"
        )


def send(upload: Upload, *, overwrite: bool = False) -> str:
    """Make the repository if there is none and commit all files. Returns the commit's address.

    The token is the one that the Hub's own tools take (``HF_TOKEN``, ``hf auth login``).

    Args:
        overwrite: replace files that the repository has; its history keeps them.

    Raises:
        UserError: there is no token, it has no right to write there, the repository is public but
            was to be private, it has some of the files, or the Hub cannot be reached.
    """
    api, repo, kind = HfApi(), upload.repo, upload.kind
    private = upload.private or None  # None: as the owner has set it
    try:
        api.whoami()
        api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        there = api.model_info(repo) if kind == "model" else api.dataset_info(repo)
        if private and not there.private:
            raise UserError(
                f"{repo} exists and is public, so nothing was sent; make it private in its "
                "settings or leave --private out"
            )
        taken = sorted(upload.files.keys() & {file.rfilename for file in there.siblings or ()})
        if taken and not overwrite:
            raise UserError(
                f"{repo} has {', '.join(taken)}, so nothing was sent; add --overwrite to replace "
                "them (its history keeps what is there)"
            )
        operations = [CommitOperationAdd(name, content) for name, content in upload.files.items()]
        message = "Upload with flatdepth"
        done = api.create_commit(repo, operations, repo_type=kind, commit_message=message)
    except UserError:
        raise
    except LocalTokenNotFoundError as error:
        raise UserError(
            f"no token of the Hub was found; make one that may write ({TOKENS}), then run hf auth "
            "login or set HF_TOKEN"
        ) from error
    except Exception as error:  # The failures of the hub's client share no narrower base class.
        raise UserError(_refusal(repo, error)) from error
    return str(done.commit_url)


def _refusal(repo: str, error: BaseException) -> str:
    if isinstance(error, RuntimeError) and error.__cause__:  # what an upload failed of
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"{constants.ENDPOINT} does not accept the token; make another ({TOKENS})"
    if status == 403:
        return f"the token may not write to {repo}; take one that may ({TOKENS}) or another OWNER"
    first = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
    return f"{repo} could not be sent to {constants.ENDPOINT} ({first}); try again"
