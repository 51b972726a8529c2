"""The Hugging Face Hub: a folder becomes one commit of a repository, or an error of one line says why not."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..errors import UserError

# What a connection raises: errors of httpx, or of requests before huggingface_hub 1.0, whose base is that of
# HfHubHTTPError in either; both raise the system's own errors too.
_CONNECTION = (OSError, *HfHubHTTPError.__bases__)


def check_repository(repo: str) -> None:
    """Checks the name of a repository to write to.

    Raises:
        UserError: It is not USER/NAME as the Hub takes them.
    """
    try:
        validate_repo_id(repo)
        wrong = "" if repo.count("/") == 1 else "whose it is and its name are needed"
    except HFValidationError as e:
        wrong = _first_line(e)
    if wrong:
        raise UserError(f"A repository is named USER/NAME, got {repo!r}: {wrong}")


def check_token() -> None:
    """Checks that there is a token, in HF_TOKEN or where `hf auth login` keeps it; it may still be refused.

    Raises:
        UserError: There is none.
    """
    if get_token() is None:
        raise UserError("There is no token for the Hub: run `hf auth login`, or set HF_TOKEN.")


def push_folder(
    folder: Path, repo: str, *, message: str, private: bool = False, revision: str | None = None
) -> CommitInfo:
    """Makes the files of a folder one commit of a repository, which is created if there is none.

    The large files go first and the commit last: whatever breaks off before it leaves the repository as it was.

    Args:
        folder: Without folders in it.
        repo: USER/NAME.
        message: Of the commit.
        private: Make a new repository private.
        revision: A branch, created from main if there is none; None means main.

    Raises:
        UserError: There is no token, it is refused or may not write there; the Hub cannot be reached or breaks off; the
            repository is to be private and is public.
    """
    check_repository(repo)
    check_token()
    api = HfApi(library_name="nat_models")
    with _explain_errors(repo, api.endpoint):
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise UserError(
                f"{repo} is there already and is public: nothing was pushed. Leave out --private, or rename."
            )
        if revision not in (None, "main"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        files = sorted(path for path in folder.iterdir() if path.is_file())
        operations = [CommitOperationAdd(path.name, path) for path in files]
        return api.create_commit(repo, operations, commit_message=message, revision=revision)


@contextmanager
def _explain_errors(repo: str, endpoint: str) -> Iterator[None]:
    """Turns what pushing raises into one UserError of one line."""
    try:
        yield
    except RevisionNotFoundError as e:
        raise UserError(f"{repo} has no such revision: {_first_line(e)}") from e
    except HfHubHTTPError as e:
        raise UserError(_refusal(repo, e)) from e
    except _CONNECTION as e:
        raise UserError(_broken(repo, endpoint, e)) from e
    except RuntimeError as e:  # put around what an upload of a large file raised
        print(file=sys.stderr)  # ends the line of its progress bar, which the client leaves open
        if isinstance(e.__cause__, HfHubHTTPError):
            raise UserError(_refusal(repo, e.__cause__)) from e
        if not isinstance(e.__cause__, _CONNECTION):
            raise
        raise UserError(_broken(repo, endpoint, e.__cause__)) from e
    except ValueError as e:  # of the model card's metadata, or of files that the Hub does not take
        raise UserError(f"The Hub takes no such files for {repo}: {' '.join(str(e).split())}") from e


def _refusal(repo: str, error: HfHubHTTPError) -> str:
    status = getattr(error.response, "status_code", None)
    if status == 401:
        return f"The Hub does not accept the token: run `hf auth login`, or set HF_TOKEN. ({_first_line(error)})"
    if status == 403:
        return f"The token may not write to {repo}: its role must be `write`. ({_first_line(error)})"
    if isinstance(error, RepositoryNotFoundError):
        return f"There is no repository {repo}, or the token may not see it. ({_first_line(error)})"
    return f"The Hub refused the files for {repo}; it is as it was. ({_first_line(error)})"


def _broken(repo: str, endpoint: str, error: BaseException) -> str:
    return (
        f"The Hub at {endpoint} cannot be reached, or broke off; {repo} is as it was. Push again. "
        f"({type(error).__name__}: {_first_line(error)})"
    )


def _first_line(error: BaseException) -> str:
    """The Hub's messages begin with empty lines, and go on for several."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
