"""Damaged files beside the weights are refused, not passed over."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from planner.model.companions import check_companions
from planner.model.hub import COMPANIONS, TEMPLATES, TOKENIZERS
from tests.conftest import one_line
from vllm_moeq.format import ConfigError

SETTINGS = [name for name in COMPANIONS if name.endswith(".json") and name not in TOKENIZERS]
TEXTS = ["chat_template.jinja", "merges.txt", "additional_chat_templates/tools.jinja"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": 1, "a": 2}', b"\xff{}", b"null"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_an_object(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{tmp_path / name}: "):
        check_companions(tmp_path)
    (tmp_path / name).write_bytes(b'{"temperature": 0.5}')
    check_companions(tmp_path)


@pytest.mark.parametrize("name", TEXTS)
def test_templates_are_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"{{ bos }} \xe9")
    with pytest.raises(ConfigError, match=f"{name}: expected UTF-8, found a byte 0xe9"):
        check_companions(tmp_path)
    (tmp_path / name).write_text("{{ bos }} é", encoding="utf-8")
    check_companions(tmp_path)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Be nobody where this process is root's, who may read everything."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("name", [*TOKENIZERS, *SETTINGS, *TEXTS, TEMPLATES])
def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Before any work: copying comes last."""
    monkeypatch.chdir(tmp_path)  # nobody need not see the folders above it
    tmp_path.chmod(0o755)
    if name == TEMPLATES:
        Path(name).mkdir()
    else:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}")
    with unprivileged():
        check_companions(Path())
    Path(name).chmod(0)
    with unprivileged(), pytest.raises(ConfigError, match=f"^{name}: cannot read .Permission denied.$"):
        check_companions(Path())
    Path(name).chmod(0o700)


@pytest.mark.slow
def test_no_command_copies_or_passes_them(
    moeq: Callable[..., Any], mixtral_copy: Path, quantized_copy: Path, tmp_path: Path
) -> None:
    for folder in (mixtral_copy, quantized_copy):
        (folder / "generation_config.json").write_text('{"eos_token_id": ')
    output = tmp_path / "output"
    for command in (
        ("quantize", mixtral_copy, "--avg-bits", "2", "--quantizer", "rtn", "-o", output),
        ("verify", quantized_copy),
        ("push", quantized_copy, "owner/name", "--dry-run"),
        ("export", quantized_copy, "-o", output),
    ):
        assert "generation_config.json: not valid JSON" in one_line(moeq(*command)), command
        assert not output.exists()
