"""Uploads of a saved model as one commit: the whole model becomes visible on the Hub, or nothing of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from ..version import __version__
from .card import NAME as CARD
from .card import is_users_own, model_card

logger = logging.getLogger(__name__)

# Files of a model's weights that a new upload replaces. A `model.safetensors` that stays behind would be loaded in
# place of newer shards, and a report would be of other weights. Adapters and GGUF files are other things.
_WEIGHTS = re.compile(
    r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)|(model\.safetensors|pytorch_model\.bin)\.index\.json"
    r"|arb_report\.json"
)


def push_directory(
    directory: str | Path,
    repo_id: str,
    *,
    files: Iterable[str] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tags: Iterable[str] = (),
) -> CommitInfo:
    """Uploads a saved binarized model with its card, in one commit that also removes the weights that it replaces.

    The local files stay as they are. A card on the Hub that this package did not write, or that was changed by hand,
    stays too; otherwise the directory's is uploaded, written anew unless a user wrote it.

    Args:
        directory: where the model lies.
        repo_id: the model's name on the Hub; the repository is made if there is none.
        files: what to upload, relative to the directory; None is everything in it that is not hidden.
        private: whether a new repository is private; None is the account's default.
        token: None is the one that `hf auth login` stored, or that of the environment.
        revision: the branch, which is made from the main one if there is none; None is the main one.
        create_pr: whether to open a pull request instead.
        commit_message: of the commit.
        commit_description: of the commit.
        tags: more tags for the card.

    Raises:
        FileNotFoundError: the directory holds no complete binarized model.
        ValueError: it is not binarized, the name is none that the Hub takes, or the repository was to be private and
            is public already.
        PermissionError: the token is missing or wrong, or may not write there.
        ConnectionError: the Hub cannot be reached.
        OSError: the Hub, or the transfer to it, failed.
    """
    directory = Path(directory)
    model_card(directory)  # what is no binarized model leaves no repository behind
    names = sorted(files) if files is not None else visible_files(directory)
    api = HfApi(library_name="optimum_arb", library_version=__version__, token=token)
    broken = "What is there is whole: as it was, or, if the connection broke after the last byte, as uploaded."
    with hub_errors(f"Could not upload {directory.name} to {repo_id}", "The model there is as it was.", broken):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError(
                f"{repo_id} exists and is public. Make it private in its settings, or choose another name."
            )
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        present = set(api.list_repo_files(repo_id, revision=revision))
        additions = [CommitOperationAdd(name, directory / name) for name in names if name != CARD]
        card = _card(directory, repo_id, tags, token, revision, CARD in present)
        if card is not None:
            additions.append(CommitOperationAdd(CARD, card))
        stale = sorted(name for name in present - set(names) if _WEIGHTS.fullmatch(name))
        return api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(name) for name in stale)],
            commit_message=commit_message or "Upload a model binarized with optimum_arb",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def check_access(repo_id: str, token: str | bool | None = None) -> None:
    """Whether an upload can be hoped for; to be asked before hours of work. Nothing is made on the Hub.

    Raises:
        ValueError, PermissionError, ConnectionError, OSError: as `push_directory`.
    """
    with hub_errors(f"Cannot upload to {repo_id}", "Nothing was done."):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id):
            raise ValueError(f"{repo_id!r} is no name of a model on the Hub: it must be like 'me/my-model'.")
        account = HfApi(library_name="optimum_arb", library_version=__version__, token=token).whoami()
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise PermissionError(
                f"Cannot upload to {repo_id}: the token of {account.get('name')} may only read. Log in with one that "
                "may write: hf auth login"
            )


@contextmanager
def hub_errors(what: str, kept: str, broken: str | None = None) -> Iterator[None]:
    """Turns the errors of the Hub's client into one sentence each.

    Args:
        what: what failed, the beginning of the sentence.
        kept: what was not lost, the sentence after it.
        broken: the same where the connection broke; None is `kept`.

    Raises:
        PermissionError, ConnectionError, OSError: as `push_directory`.
    """
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:
        if isinstance(error, (PermissionError, FileNotFoundError)):
            raise
        cause: BaseException = error
        while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
            cause = cause.__cause__  # of an upload in a thread
        if isinstance(cause, OfflineModeIsEnabled):
            raise ConnectionError(f"{what}: HF_HUB_OFFLINE is set. {kept}") from error
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            status = cause.response.status_code
            if status in (401, 403):
                reason = "does not accept the token" if status == 401 else "does not let this token write there"
                raise PermissionError(
                    f"{what}: the Hub {reason} ({status}). Log in with a token that may write: hf auth login. {kept}"
                ) from error
            detail = cause.server_message or str(cause).splitlines()[0]
            raise OSError(f"{what}: the Hub answered {status} ({detail}). {kept}") from error
        if isinstance(cause, HTTPError):
            raise ConnectionError(
                f"{what}: the Hub cannot be reached ({type(cause).__name__}: {cause}). {broken or kept}"
            ) from error
        if type(cause).__name__ == "LocalTokenNotFoundError":
            raise PermissionError(f"{what}: no token was found. Log in with one: hf auth login. {kept}") from error
        raise OSError(f"{what}: {cause}. {kept}") from error


def visible_files(directory: Path) -> list[str]:
    """All files of a directory that are not hidden, relative to it."""
    found = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


def _card(
    directory: Path, repo_id: str, tags: Iterable[str], token: str | bool | None, revision: str | None, present: bool
) -> bytes | None:
    """The card to upload; None where the one on the Hub is to stay."""
    if present and is_users_own(Path(hf_hub_download(repo_id, CARD, revision=revision, token=token))):
        logger.warning("The model card of %s was not written by optimum_arb, or was changed: it stays.", repo_id)
        return None
    local = directory / CARD
    if is_users_own(local):
        return local.read_bytes()
    return str(model_card(directory, repo_id, tags, online=True, token=token)).encode()
