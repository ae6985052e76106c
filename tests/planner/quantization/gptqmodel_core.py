"""Run as a program: GPTQModel's GPTQ on one matrix with a given Hessian, for several widths.

python gptqmodel_core.py problem.safetensors results.safetensors
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default fails on small machines

import torch
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from safetensors.torch import load_file, save_file


def quantize(weight: torch.Tensor, hessian: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    """Return the dequantized result [N, K] for weights [N, K] and second moments [K, K]; groups of 128."""
    config = QuantizeConfig(
        bits=bits,
        group_size=128,
        sym=symmetric,
        desc_act=False,
        act_group_aware=False,
        static_groups=False,
        damp_percent=0.01,
        mse=0.0,
        offload_to_disk=False,
        fallback=None,
    )
    rows, columns = weight.shape
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = weight.clone()
    task = GPTQ(linear, config)
    task.quantizer.configure(perchannel=True)
    task.H = hessian.clone()
    task.nsamples = 1
    task._hessian_dirty = False  # or it would be made from batches
    return task.quantize(blocksize=128)[0].float().contiguous()  # type: ignore[no-any-return]


if __name__ == "__main__":
    torch.set_num_threads(1)
    problem = load_file(sys.argv[1])
    cases = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]
    found = {
        f"{bits}-{symmetric}": quantize(problem["weight"], problem["hessian"], bits, symmetric)
        for bits, symmetric in cases
    }
    save_file(found, sys.argv[2])
