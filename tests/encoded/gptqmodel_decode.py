"""Run as a program: decode GPTQ's and AWQ's forms by GPTQModel.

python gptqmodel_decode.py forms.safetensors decoded.safetensors

The first file has tensors ``FORM.SUFFIX``, and in its metadata FORM → bits, group size, how zero points are stored.
"""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default fails on small machines

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from safetensors import safe_open
from safetensors.torch import save_file


def decode(tensors: dict[str, torch.Tensor], bits: int, group: int, version: str) -> torch.Tensor:
    """Return the weights [N, K]."""
    if version == "awq":
        found = dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"], bits, group)
        return found.T.contiguous()  # type: ignore[no-any-return]
    columns, rows = len(tensors["g_idx"]), tensors["scales"].shape[1]
    module = TorchLinear(
        bits=bits, group_size=group, sym=False, desc_act=True, in_features=columns, out_features=rows, bias=False,
        pack_dtype=torch.int32, register_buffers=True,
    )  # fmt: skip
    for name, tensor in tensors.items():
        setattr(module, name, tensor)
    if version == "gptq":
        convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    module.post_init()
    return module.dequantize_weight().float().T.contiguous()  # type: ignore[no-any-return]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with safe_open(sys.argv[1], framework="pt") as file:
        forms = {name: json.loads(value) for name, value in file.metadata().items()}
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    decoded = {
        form: decode({n.split(".")[1]: t for n, t in stored.items() if n.split(".")[0] == form}, *about)
        for form, about in forms.items()
    }
    save_file(decoded, sys.argv[2])
