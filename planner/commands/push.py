"""``moeq push``: a checkpoint to the Hub."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from planner.commands import show
from planner.commands.flags.common import Folder, Json
from planner.common.progress import Progress
from planner.common.shown import add_row, say
from planner.common.units import size
from planner.model.whole import check_checkpoint
from planner.reporting.files import checkpoint_files, other_files
from vllm_moeq.format import UsageError

REASONS = {
    401: "the Hub accepts no token of yours: set HF_TOKEN, or run hf auth login",
    403: "your token may not write there",
    404: "the Hub has no such repository or branch, or does not show it to you",
}
"""HTTP status → its meaning here."""


def push_command(
    folder: Folder,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="Branch, made if there is none [main].")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the files, upload nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Check a checkpoint's headers, then upload it to the Hugging Face Hub; the token is HF_TOKEN's or your login's.

    Example: moeq push Mixtral-8x7B-2.5bit you/Mixtral-8x7B-2.5bit
    """
    _check_name(repo)
    check_checkpoint(folder, values=False)
    files, others = checkpoint_files(folder), other_files(folder)
    if others:
        Progress().line(f"note: {len(others)} other files stay here: {', '.join(map(repr, others)):.500}")
    facts: dict[str, Any] = {"repo": repo, "files": files, "bytes": sum(files.values())}
    if not dry_run:
        Progress().line(f"pushing {len(files)} files, {size(facts['bytes'])}, to {repo}")
        facts |= _upload(folder, repo, list(files), private, revision)
    if as_json:
        show.emit(facts)
    elif dry_run:
        _print_files(files)
    else:
        say(f"pushed: {facts['url']}")


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{repo}: expected a name on the Hub such as owner/name ({_line(error)})") from None


def _upload(folder: Path, repo: str, names: list[str], private: bool, revision: str | None) -> dict[str, Any]:
    """Upload files; return the addresses of repository and commit.

    Raises:
        UsageError: the Hub refuses or is not there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # The HTTP library is another in other versions of huggingface_hub; this is the base of its errors.
    network_error: type[Exception] = HfHubHTTPError.__bases__[0]
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        patterns = [glob.escape(name) for name in names]
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=patterns,
            revision=revision,
            commit_message="Upload a checkpoint of vllm-moeq",
        )
    except (network_error, OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{repo}: cannot push: {_reason(error)}") from None
    return {"url": str(url), "commit": commit.oid}


def _reason(error: Exception) -> str:
    """Return the Hub's reason in one line."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return REASONS.get(status) or _line(error)


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _print_files(files: dict[str, int]) -> None:
    table = Table("file", "size")
    for name, count in files.items():
        add_row(table, name, size(count))
    Console().print(table)
