"""Where the repository, its shipped models, its texts and its command are."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "benchmarks" / "models"
MIXTRAL = MODELS / "stdlib-mixtral"
QWEN = MODELS / "stdlib-qwen3-moe"
SHIPPED = (MIXTRAL.name, QWEN.name)
CALIBRATION_TEXT = MODELS / "calibration.jsonl"

MOEQ = str(Path(sys.executable).with_name("moeq"))
