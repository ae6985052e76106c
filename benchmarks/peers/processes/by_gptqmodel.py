"""Quantize a model's experts with GPTQModel at its defaults, layer by layer, and read back what it saves."""

from __future__ import annotations

import os
import tempfile
import time

import torch

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default fails on machines with few cores

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file, save_file

from benchmarks.peers.processes.job import matrix_name, read_job

EXPERTS_ALONE: dict[str, dict[str, int]] = {
    r"-:.*self_attn\..*": {},
    r"-:.*shared_expert.*": {},
    r"-:.*mlp\.(gate|up|down)_proj$": {},
}
"""Rules that leave every other linear of a decoder layer as it is."""


def main() -> None:
    """Do the job."""
    job, found = read_job(), {}
    settings = QuantizeConfig(
        bits=job.bits, group_size=job.group, dynamic=EXPERTS_ALONE, offload_to_disk=False, **job.options
    )
    model = GPTQModel.load(job.model, settings, device="cpu")
    rows = load_file(job.tokens)["tokens"]
    text = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows]
    began = time.perf_counter()
    model.quantize(text, batch_size=1)
    seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model.save(folder)
        saved = GPTQModel.load(folder, device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH).model
        for module, parts in saved.named_modules():
            name = matrix_name(module)
            if name is not None and hasattr(parts, "qweight"):
                found[name] = parts.dequantize_weight().T.float().contiguous()
    save_file(found, job.output)
    job.finish(seconds, ("gptqmodel", "torch", "transformers"))


if __name__ == "__main__":
    main()
