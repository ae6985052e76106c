"""Let GPTQModel quantize and load checkpoints: python gptqmodel_process.py JOBS.json

It runs in a process of its own, since importing GPTQModel changes transformers. A job is an object with ``source``,
``format`` and ``output`` (quantize a model), or with ``folder``, ``tokens`` and ``output`` (load a checkpoint in
float16 and save its logits and all its dequantized matrices [N, K] under the names of their modules).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import save_file

RULES = {r"+:.*experts\.0\..*": {"bits": 2}, r"+:.*experts\.1\..*": {"bits": 3}, r"+:.*experts\.2\..*": {"bits": 8}}


def quantize(job: dict[str, Any]) -> None:
    settings = QuantizeConfig(
        bits=4, group_size=128, sym=job["format"] == "gptq", desc_act=False, act_group_aware=False,
        dynamic=RULES, format=job["format"], offload_to_disk=False,
    )  # fmt: skip
    model = GPTQModel.load(job["source"], settings, device="cpu")
    text = (Path(job["source"]) / "held_out.txt").read_text()
    model.quantize([text[i : i + 2000] for i in range(0, 8000, 2000)], batch_size=1)
    model.save(job["output"])


def load(job: dict[str, Any]) -> None:
    model = GPTQModel.load(job["folder"], device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH).model
    with torch.inference_mode():
        found = {"logits": model(torch.tensor([job["tokens"]])).logits.float().contiguous()}
        for name, module in model.named_modules():
            if hasattr(module, "qweight"):
                found[name] = module.dequantize_weight().T.contiguous()
    save_file(found, job["output"])


if __name__ == "__main__":
    for each in json.loads(Path(sys.argv[1]).read_text()):
        (quantize if "source" in each else load)(each)
