"""Where the repository, its shipped models and its command are."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "benchmarks" / "models"
MIXTRAL = MODELS / "stdlib-mixtral"
QWEN = MODELS / "stdlib-qwen3-moe"
