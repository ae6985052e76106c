"""A finished plan in the folder of an unfinished run: the run that continues takes it and does not plan again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from planner.model.source import SourceModel
from planner.output.files import validated, write_json
from planner.output.unfinished import PLANNED, PLANNED_FROM_TEXT, partial_folder, refuse_other
from planner.plan_file import Plan
from planner.planning.request import PlanOptions
from vllm_moeq.format import CheckpointError, ConfigError, ShardSet, read_json

FROM_WEIGHTS = "planned-from-weights.json"
"""The plan of a method that reads no text: it alone is no reason to keep the folder, since it is soon made again."""

ANSWERED_ELSEWHERE = ("method", "stats", "temporary_stats", "initial_model", "ranked", "calibrated")
"""Fields of the options that the request replaces by what they stand for."""


@dataclass(frozen=True)
class PlanRequest:
    """Everything that decides a plan, as JSON values.

    Attributes:
        model: fingerprint of the model.
        plan: the options.
        calibration: facts about the text; None if the method reads none.
    """

    model: str
    plan: dict[str, Any]
    calibration: dict[str, Any] | None

    @classmethod
    def of(cls, model: SourceModel, options: PlanOptions, calibration: Mapping[str, Any] | None) -> PlanRequest:
        """Return the request for a plan.

        Raises:
            CheckpointError: the statistics or the model before training cannot be read.
        """
        kept = {item.name: getattr(options, item.name) for item in fields(options)}
        for name in ANSWERED_ELSEWHERE:
            del kept[name]
        kept |= {
            "method": options.resolved_method,
            "avg_bits": str(options.avg_bits),
            "trellis_bits": None if options.trellis_bits is None else str(options.trellis_bits),
            "linears": None if options.linears is None else asdict(options.linears),
            "stats": _digest(options.stats) if options.stats is not None and options.stats.is_file() else None,
            "initial_model": _stamps(options.initial_model) if options.initial_model is not None else None,
        }
        return cls(model.fingerprint(), json.loads(json.dumps(kept)), json.loads(json.dumps(calibration)))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields under the names that a run's fingerprint has, for messages."""
        return {"model": self.model, "plan": self.plan, "calibration": self.calibration}


def keep_plan(folder: Path, request: PlanRequest, plan: Plan) -> None:
    """Write a finished plan atomically to the folder of an unfinished run."""
    name = FROM_WEIGHTS if request.calibration is None else PLANNED_FROM_TEXT
    write_json(folder / name, {"request": request.as_dict(), "plan": plan.model_dump(mode="json")})


def kept_plan(output: Path, request: PlanRequest) -> Plan | None:
    """Return the plan that an earlier run made for the same output, or None if it left none.

    Raises:
        UsageError: it made another plan.
        ConfigError: the plan is damaged.
    """
    folder = partial_folder(output)
    for path in sorted(folder.glob(PLANNED)):
        found = read_json(path)
        if not isinstance(found, dict) or not isinstance(found.get("request"), dict):
            raise ConfigError(f"{path}: expected a plan and its request, found others; --no-resume deletes them")
        refuse_other(folder, found["request"], request.as_dict())
        return validated(path, found.get("plan"), Plan)
    return None


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"--stats: {path}: cannot read ({error.strerror})") from None


def _stamps(folder: Path) -> dict[str, list[int]]:
    with ShardSet(folder) as shards:
        return shards.stamps()
