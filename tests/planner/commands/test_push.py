"""``moeq push`` with the Hub's real client against a stand-in for the Hub."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Outcome, one_line
from tests.planner.hub import READ_ONLY, TOKEN, Hub, open_hub

pytestmark = pytest.mark.slow

REPO = "someone/tiny-2bit"
Moeq = Callable[..., Outcome]
Push = Callable[..., Outcome]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with open_hub() as found:
        yield found


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, hub: Hub, tmp_path: Path) -> dict[str, str]:
    """The variables of a user of the stand-in, without this machine's own login, switches and proxies."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf-home"), "HF_HUB_DISABLE_XET": "1"}


@pytest.fixture
def push(moeq: Moeq, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Push:
    """Return a function that runs the command in this process, where the client has read its variables long ago."""
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))

    def run(*arguments: object, token: str | None = TOKEN, url: str = environment["HF_ENDPOINT"]) -> Outcome:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        if token is None:
            monkeypatch.delenv("HF_TOKEN", raising=False)
        else:
            monkeypatch.setenv("HF_TOKEN", token)
        close_session()
        return moeq("push", *arguments)

    return run


def belongs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_every_byte_arrives_and_nothing_else(
    moeq_process: Moeq, environment: dict[str, str], hub: Hub, quantized_copy: Path
) -> None:
    expected = belongs(quantized_copy)
    for name in (".lock", ".model-00001.tmp", "fingerprint.json", "notes.txt", "model-9.safetensors.partial"):
        (quantized_copy / name).write_text("not part of it")
    (quantized_copy / "checkpoint.partial").mkdir()
    (quantized_copy / "checkpoint.partial" / "config.json").write_text("{}")
    variables = {**os.environ, **environment, "HF_TOKEN": TOKEN}
    outcome = moeq_process("push", quantized_copy, REPO, "--json", env=variables)
    assert outcome.code == 0, outcome.err
    assert hub.branches == {(REPO, "main"): expected}
    assert hub.stored, "weights go to large file storage"
    facts = json.loads(outcome.out)
    assert facts["url"] == f"{hub.url}/{REPO}"
    assert facts["files"] == {name: len(data) for name, data in sorted(expected.items())}


def test_report_and_evaluation_go_along(push: Push, moeq: Moeq, hub: Hub, quantized_copy: Path) -> None:
    assert moeq("report", quantized_copy, "--no-png").code == 0
    assert push(quantized_copy, REPO).out.strip() == f"pushed: {hub.url}/{REPO}"
    assert hub.branches[REPO, "main"]["report.html"] == (quantized_copy / "report.html").read_bytes()


def test_other_files_are_named_and_stay(push: Push, hub: Hub, quantized_copy: Path) -> None:
    (quantized_copy / "notes.txt").write_text("mine")
    (quantized_copy / "LICENSE").write_text("free")
    outcome = push(quantized_copy, REPO)
    assert "1 other files stay here: 'notes.txt'" in outcome.err
    assert hub.branches[REPO, "main"].keys() >= {"LICENSE", "config.json"}
    assert "notes.txt" not in hub.branches[REPO, "main"]


@pytest.mark.parametrize("name", ["LICENSE", "LICENSE-key", "tokenizer.json", "report.html", "anything"])
def test_links_out_of_the_folder_are_refused(
    push: Push, hub: Hub, quantized_copy: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "secret").write_text("secret")
    (quantized_copy / name).symlink_to(tmp_path / "secret")
    assert f"{name}: expected a file inside the folder" in one_line(push(quantized_copy, REPO))
    assert not hub.branches


NOT_OURS: dict[str, tuple[Callable[[Path], object], str]] = {
    "report.html": (lambda path: os.truncate(path, 5 << 30), "expected at most 67108864 bytes, found 5368709120"),
    "report-widths.png": (lambda path: path.write_text("TOPSECRET"), "expected a PNG picture"),
    "evaluation.json": (lambda path: path.write_text("TOPSECRET"), "not valid JSON"),
    "quantization_report.json": (lambda path: path.write_text("TOPSECRET"), "not valid JSON"),
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_only_has_one_of_our_names_is_refused(push: Push, hub: Hub, quantized_copy: Path, name: str) -> None:
    make, words = NOT_OURS[name]
    (quantized_copy / name).touch()
    make(quantized_copy / name)
    message = one_line(push(quantized_copy, REPO))
    assert name in message
    assert words in message
    assert not hub.branches


def test_a_private_repository_and_a_branch(push: Push, hub: Hub, quantized_mixtral: Path) -> None:
    assert push(quantized_mixtral, REPO, "--private", "--revision", "two-bits").code == 0
    assert hub.repositories == {REPO: True}
    assert hub.branches == {(REPO, "two-bits"): belongs(quantized_mixtral)}


def test_pushing_again_replaces_what_changed(push: Push, hub: Hub, quantized_copy: Path) -> None:
    assert push(quantized_copy, REPO).code == 0
    (quantized_copy / "README.md").write_text("another card")
    assert push(quantized_copy, REPO).code == 0
    assert hub.branches[REPO, "main"]["README.md"] == b"another card"


def test_a_dry_run_asks_the_hub_nothing(push: Push, hub: Hub, quantized_mixtral: Path) -> None:
    outcome = push(quantized_mixtral, REPO, "--dry-run", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["files"].keys() == belongs(quantized_mixtral).keys()
    assert hub.asked == []


def test_a_damaged_checkpoint_is_not_pushed(push: Push, hub: Hub, quantized_copy: Path) -> None:
    shard = sorted(quantized_copy.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-64])
    assert f"{shard}: damaged or truncated" in one_line(push(quantized_copy, REPO), "pushing ")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (None, "accepts no token of yours"),
        ("hf_wrong", "accepts no token of yours"),
        (READ_ONLY, "your token may not write there"),
    ],
)
def test_tokens_that_do_not_do(push: Push, hub: Hub, quantized_mixtral: Path, token: str | None, reason: str) -> None:
    message = one_line(push(quantized_mixtral, REPO, token=token), "pushing ")
    assert message.startswith(f"error: {REPO}: cannot push: ")
    assert reason in message
    assert hub.branches == {}


def test_a_pull_request_that_does_not_exist(push: Push, hub: Hub, quantized_mixtral: Path) -> None:
    message = one_line(push(quantized_mixtral, REPO, "--revision", "refs/pr/7"), "pushing ")
    assert "the Hub has no such repository or branch" in message
    assert hub.branches == {}


def test_a_hub_that_is_not_there(push: Push, quantized_mixtral: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        message = one_line(push(quantized_mixtral, REPO, url=url), "pushing ")
    assert f"{REPO}: cannot push: " in message
    assert "refused" in message.lower()


@pytest.mark.parametrize("name", ["a/b/c", "someone/", "some one/x", "../x"])
def test_impossible_names(push: Push, hub: Hub, quantized_mixtral: Path, name: str) -> None:
    assert f"{name}: expected a name on the Hub such as owner/name" in one_line(
        push(quantized_mixtral, name), "pushing "
    )
    assert hub.asked == []
