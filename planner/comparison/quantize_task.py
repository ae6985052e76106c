"""Quantize a model by one plan, in this process or in another one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from planner.calibration.gptq.runner import GptqRunner
from planner.calibration.reading.decoder import compute_dtype
from planner.calibration.reading.text import CalibrationText, calibration_facts
from planner.common.progress import Progress
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from planner.plan_file import Plan
from planner.quantization.run import quantize
from planner.quantization.settings import QuantizeSettings


@dataclass(frozen=True)
class QuantizeTask:
    """The task of writing the checkpoint of one plan.

    Attributes:
        label: name of the task in messages.
        source: folder of the model.
        plan: the widths.
        folder: folder to create.
        settings: how to quantize.
        text: calibration text for GPTQ; None for quantizers without calibration.
    """

    label: str
    source: Path
    plan: Plan
    folder: Path
    settings: QuantizeSettings
    text: CalibrationText | None

    def run(self, threads: int, device: torch.device) -> None:
        """Write the checkpoint.

        Raises:
            MoeqError: damaged tensors, a full disk.
        """
        quiet = Progress(quiet=True)
        with SourceModel(self.source) as model:
            layout = read_layout(model)
            if self.text is None:
                quantize(model, layout, self.plan, self.folder, self.settings, quiet)
                return
            runner = GptqRunner(self.text, threads, (device,), compute_dtype(device))
            facts = calibration_facts(self.text, device)
            quantize(model, layout, self.plan, self.folder, self.settings, quiet, runner=runner, calibration=facts)
