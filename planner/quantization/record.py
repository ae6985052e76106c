"""quantization_report.json: what quantizing writes about itself, and how reports read it back, trusting nothing."""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from planner.model.source import SourceModel
from planner.output.files import read_as
from vllm_moeq.format.schema import MAX_EXPERTS, MAX_LAYERS

FILE = "quantization_report.json"
README = "README.md"
MAX_README = 1 << 20
FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
PLAIN_LINE = re.compile(r"^(license|license_name|license_link):[ \t]*([^\r\n]*?)[ \t]*\r?$", re.MULTILINE)


def printable(text: str) -> str:
    """Return text without what could hide or reorder the rest: line breaks, controls, changes of direction."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def without_folder(name: str) -> str:
    """Return the last part of an absolute path, which says something of a machine only; other names as they are."""
    return PurePath(name).name if PurePath(name).is_absolute() else name


Text = Annotated[str, Field(max_length=512), AfterValidator(printable)]


class _Read(BaseModel):
    """Unknown keys are left out: other versions may write more."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class SourceRecord(_Read):
    """The model that was quantized: Hub name or folder name, commit on the Hub, bytes of its tensors, licence."""

    name: Text
    revision: Text | None = None
    bytes: Annotated[int, Field(gt=0)]
    license: Text | None = None
    license_name: Text | None = None
    license_link: Text | None = None


class CalibrationRecord(_Read):
    """The text that was read: ``sequences`` × ``seq_len`` tokens."""

    data: Text
    seed: int = 0
    sequences: int
    seq_len: int


class GptqRecord(_Read):
    """How GPTQ worked; see :class:`planner.quantization.quantizers.gptq.GptqSettings`."""

    damping: float
    act_order: Text
    static_groups: bool
    symmetric: bool
    search: Text


class SettingsRecord(_Read):
    """What decided the output besides the plan, where config.json does not tell; see ``QuantizeSettings``."""

    zero_points: Text = "float"
    min_tokens: int = 64
    gptq: GptqRecord | None = None


class ExpertRecord(_Read):
    """How well one expert survived; see :class:`planner.quantization.packed.ExpertReport`."""

    expert: Annotated[int, Field(ge=0, lt=MAX_EXPERTS)]
    relative_error: float | None = None
    fallback: Text | None = None
    tokens: int | None = None
    output_error: float | None = None


class LayerRecord(_Read):
    """The experts of one layer."""

    prefix: Text
    experts: Annotated[list[ExpertRecord], Field(fail_fast=True, max_length=MAX_EXPERTS)]


class Recorded(_Read):
    """The contents of quantization_report.json."""

    quantizer: Text | None = None
    one_bit: Text | None = None
    layers: Annotated[list[LayerRecord], Field(fail_fast=True, max_length=MAX_LAYERS)] = Field(default_factory=list)
    calibration: CalibrationRecord | None = None
    settings: SettingsRecord = Field(default_factory=SettingsRecord)
    source: SourceRecord | None = None

    def experts(self, prefix: str) -> dict[int, ExpertRecord]:
        """Return the experts of a layer by index; none where the file has no such layer."""
        return {entry.expert: entry for layer in self.layers if layer.prefix == prefix for entry in layer.experts}


def read_recorded(folder: Path) -> Recorded:
    """Return what a checkpoint's quantization_report.json says; nothing where it has none.

    Raises:
        ConfigError: a damaged file, naming it and the first violation.
    """
    path = folder / FILE
    return read_as(path, Recorded) if path.exists() else Recorded()


def describe_source(model: SourceModel) -> dict[str, Any]:
    """Return what a checkpoint records of its source: nothing that depends on the machine or its folders."""
    name, revision = model.hub_name()
    found = {"name": name, "revision": revision, "bytes": model.stored_bytes, **_license(model.folder / README)}
    return {key: value for key, value in found.items() if value is not None}


def _license(readme: Path) -> dict[str, str]:
    """Return the licence that a model card's front matter names in plain lines."""
    if not readme.is_file() or readme.stat().st_size > MAX_README:
        return {}
    front = FRONT_MATTER.match(readme.read_text(encoding="utf-8", errors="replace"))
    if front is None:
        return {}
    lines = ((key, value.strip("'\"")) for key, value in PLAIN_LINE.findall(front[1]))
    return {key: value for key, value in lines if value and value.isprintable() and len(value) <= 512}
