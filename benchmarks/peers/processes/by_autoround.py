"""Quantize a model's experts with AutoRound, block by block; the recipe is part of the job."""

from __future__ import annotations

import time

import torch
from auto_round import AutoRound
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.processes.job import matrix_name, read_job

BATCH = 8
KEPT = "self_attn,shared_expert,lm_head"
"""Parts of the names of modules that stay as they are."""


def main() -> None:
    """Do the job."""
    job = read_job()
    rows = load_file(job.tokens)["tokens"]
    # Loaded here: by itself AutoRound 0.16.1 looks for the weights of a fused Mixtral under names that are not stored.
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    maker = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.model),
        scheme={"bits": job.bits, "group_size": job.group, "sym": job.options["sym"], "data_type": "int"},
        alg_configs=SignRoundConfig(**job.options["recipe"]),
        dataset=[{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(BATCH)],
        seqlen=rows.shape[1],
        nsamples=rows.shape[0],
        batch_size=BATCH,
        ignore_layers=KEPT,
        device_map="cpu",
        enable_torch_compile=False,
    )
    began = time.perf_counter()
    quantized, _ = maker.quantize()
    seconds = time.perf_counter() - began
    modules = {matrix_name(module): parts for module, parts in quantized.named_modules() if hasattr(parts, "scale")}
    save_file({name: parts.weight.float().contiguous() for name, parts in modules.items() if name}, job.output)
    job.finish(seconds, ("auto-round", "torch", "transformers"))


if __name__ == "__main__":
    main()
