"""quantization_report.json: the facts that quantizing records, and their validation when reports read them."""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from planner.model.source import SourceModel
from planner.output.files import read_as
from vllm_moeq.format import ConfigError
from vllm_moeq.format.fields import MAX_EXPERTS, MAX_LAYERS, Count
from vllm_moeq.format.files import check_inside, read_bytes

FILE = "quantization_report.json"
README = "README.md"
MAX_README = 1 << 20
FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
PLAIN_LINE = re.compile(r"^(license|license_name|license_link):[ \t]*([^\r\n]*?)[ \t]*\r?$", re.MULTILINE)


def printable(text: str) -> str:
    """Replace characters that could hide or reorder text: line breaks, control characters, direction marks."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def without_folder(name: str) -> str:
    """Return the last part of an absolute path, since its folders concern one machine only; keep other names."""
    return PurePath(name).name if PurePath(name).is_absolute() else name


Text = Annotated[str, Field(max_length=512), AfterValidator(printable)]


class _Read(BaseModel):
    """Base of the records, without infinite numbers. Unknown keys are ignored: other versions may write more."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


class SourceRecord(_Read):
    """The source model: Hub name or folder name, commit on the Hub, bytes of its tensors, licence."""

    name: Text
    revision: Text | None = None
    bytes: Annotated[Count, Field(gt=0)]
    license: Text | None = None
    license_name: Text | None = None
    license_link: Text | None = None


class CalibrationRecord(_Read):
    """The calibration text: ``sequences`` × ``seq_len`` tokens."""

    data: Text
    seed: int = 0
    sequences: Count
    seq_len: Count


class GptqRecord(_Read):
    """The settings of GPTQ; see :class:`planner.quantization.quantizers.gptq.GptqSettings`."""

    damping: float
    act_order: Text
    static_groups: bool
    symmetric: bool
    search: Text
    sweeps: Annotated[int, Field(ge=0)] = 0


class SettingsRecord(_Read):
    """The settings that neither the plan nor config.json contains; see ``QuantizeSettings``."""

    zero_points: Text = "float"
    min_tokens: Count = 64
    linear_quantizer: Text | None = None
    calibration: Text | None = None
    gptq: GptqRecord | None = None


class ExpertRecord(_Read):
    """The errors of one expert; see :class:`planner.quantization.packed.ExpertReport`."""

    expert: Annotated[int, Field(ge=0, lt=MAX_EXPERTS)]
    relative_error: float | None = None
    fallback: Text | None = None
    tokens: Count | None = None
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
        """Return expert index → record for a layer; empty if the file has no such layer."""
        return {entry.expert: entry for layer in self.layers if layer.prefix == prefix for entry in layer.experts}


def read_recorded(folder: Path) -> Recorded:
    """Return the contents of a checkpoint's quantization_report.json; an empty record if there is no file.

    Raises:
        CheckpointError: a link that leads out of the folder.
        ConfigError: a damaged file; the message names it and the first violation.
    """
    path = folder / FILE
    check_inside(path)
    return read_as(path, Recorded) if path.exists() else Recorded()


def describe_source(model: SourceModel) -> dict[str, Any]:
    """Return the facts that a checkpoint records about its source. They do not depend on the machine or its folders."""
    name, revision = model.hub_name()
    found = {"name": name, "revision": revision, "bytes": model.stored_bytes, **_license(model.folder / README)}
    return {key: value for key, value in found.items() if value is not None}


def _license(readme: Path) -> dict[str, str]:
    """Return the licence fields of a model card's front matter; only plain ``key: value`` lines are read."""
    try:
        text = read_bytes(readme, MAX_README).decode("utf-8", errors="replace")
    except ConfigError:
        return {}  # a source without a readable card has no licence to name
    front = FRONT_MATTER.match(text)
    if front is None:
        return {}
    lines = ((key, value.strip("'\"")) for key, value in PLAIN_LINE.findall(front[1]))
    return {key: value for key, value in lines if value and value.isprintable() and len(value) <= 512}
