"""Tasks of lm-eval in local files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DATASET = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
"""

CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def write_task(folder: Path, documents: list[dict[str, Any]], name: str = "next_line", kind: str = CHOICE) -> Path:
    """Write a task of some documents; ``kind`` says what is asked of each."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    path = folder / f"{name}.yaml"
    path.write_text(DATASET.format(name=name, data=data, cache=folder / "cache") + kind)
    return path
