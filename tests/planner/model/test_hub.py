"""Companion files: one list for what is downloaded, copied and pushed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planner.model.hub import COMPANIONS, MAX_COMPANION, TEMPLATES, companion_bytes, companions, has_tokenizer
from tests.conftest import one_line
from tests.paths import MIXTRAL
from vllm_moeq.format import CheckpointError

Moeq = Callable[..., Any]

EXTRA = {name: json.dumps({"contents of": name}) for name in COMPANIONS if not (MIXTRAL / name).exists()}
EXTRA |= {f"{TEMPLATES}/rag.jinja": "{{ messages }}", "chat_template.jinja": "{{ messages[0].content }}"}
"""Every companion that the shipped model does not have."""

STRANGERS = (
    "modeling_x.py", "tokenizer_old.json", "vocab", "consolidated.safetensors", "params.json", "notes.txt",
    f"{TEMPLATES}/code.py", "pytorch_model.bin", "tokenizer_config_old.json",
)  # fmt: skip
"""No companions: code, weights, and what nobody reads."""


def dress(folder: Path) -> Path:
    """Add every companion and some strangers to a folder."""
    (folder / TEMPLATES).mkdir()
    for name, content in EXTRA.items():
        (folder / name).write_text(content)
    for name in STRANGERS:
        (folder / name).write_text("not to be copied")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return dress(shutil.copytree(MIXTRAL, tmp_path / "model"))


def test_every_companion_is_found_and_no_stranger(model: Path) -> None:
    assert companions(model) == sorted({*COMPANIONS, f"{TEMPLATES}/rag.jinja"})
    assert companion_bytes(model) == sum((model / name).stat().st_size for name in companions(model))


@pytest.mark.slow
def test_quantize_copies_them(moeq: Moeq, model: Path, tmp_path: Path) -> None:
    (model / "vocab.json").unlink()  # a vocabulary that does not belong to the tokenizer
    outcome = moeq("quantize", model, "--avg-bits", 3, "--quantizer", "rtn", "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    for name in companions(model):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes(), name
    assert not [name for name in STRANGERS if (tmp_path / "out" / name).exists()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_links_out_of_the_folder_are_refused(moeq: Moeq, model: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    (model / name).unlink()
    (model / name).symlink_to(tmp_path / "secret")
    outcome = moeq("quantize", model, "--avg-bits", 3, "--quantizer", "rtn", "-o", tmp_path / "out")
    assert f"{name}: expected a file inside the folder, found a link to" in one_line(outcome)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_link_within_the_folder_is_followed(model: Path) -> None:
    (model / "merges.txt").unlink()
    (model / "merges.txt").symlink_to("vocab.txt")
    assert "merges.txt" in companions(model)


def test_a_folder_of_templates_elsewhere_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "notes.jinja").write_text("secret")
    shutil.rmtree(model / TEMPLATES, ignore_errors=True)
    (model / TEMPLATES).symlink_to(tmp_path / "secrets")
    with pytest.raises(CheckpointError, match=f"{TEMPLATES}: expected a file inside the folder, found a link to"):
        companions(model)


def test_blobs_of_the_hubs_cache_are_no_link(model: Path, tmp_path: Path) -> None:
    """A folder that looks like a snapshot, whose ``blobs`` leads to the user's files."""
    snapshot, secrets = tmp_path / "models--owner--name" / "snapshots" / "0123", tmp_path / "secrets"
    shutil.copytree(model, snapshot)
    secrets.mkdir()
    (secrets / "key").write_text("secret")
    (snapshot / "merges.txt").unlink(missing_ok=True)
    (snapshot / "merges.txt").symlink_to("../../blobs/key")
    (snapshot.parents[1] / "blobs").symlink_to(secrets)
    with pytest.raises(CheckpointError, match=r"merges\.txt: expected a file inside the folder, found a link to"):
        companions(snapshot)
    (snapshot.parents[1] / "blobs").unlink()
    secrets.rename(snapshot.parents[1] / "blobs")
    assert "merges.txt" in companions(snapshot)


def test_large_files_folders_and_dead_links_are_refused(model: Path) -> None:
    with (model / "spiece.model").open("wb") as file:
        file.truncate(MAX_COMPANION + 1)
    with pytest.raises(CheckpointError, match=r"spiece\.model: expected at most 256 MiB"):
        companions(model)
    (model / "spiece.model").unlink()
    (model / "spiece.model").mkdir()
    with pytest.raises(CheckpointError, match=r"spiece\.model: expected a regular file"):
        companions(model)
    (model / "spiece.model").rmdir()
    (model / "spiece.model").symlink_to("nothing")
    with pytest.raises(CheckpointError, match=r"spiece\.model: expected a file, found a link to none"):
        companions(model)


def test_a_folder_without_a_vocabulary_has_no_tokenizer(tiny_mixtral: Path, model: Path) -> None:
    assert has_tokenizer(model)
    assert not has_tokenizer(tiny_mixtral)


@pytest.mark.slow
def test_quantize_says_that_there_is_no_tokenizer(moeq: Moeq, tiny_mixtral: Path, tmp_path: Path) -> None:
    flags = ("--avg-bits", 3, "--quantizer", "rtn", "--group-size", 32)
    outcome = moeq("quantize", tiny_mixtral, *flags, "-o", tmp_path / "out")
    assert "has no tokenizer" in outcome.err
    assert f"moeq serve {tmp_path / 'out'} --tokenizer NAME" in outcome.out.replace("\n", "")
