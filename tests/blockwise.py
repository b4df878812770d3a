"""Compile a segment for QNN with blockwise 3x3 convolutions (LPBQ), as handheld never does.

``python blockwise.py SEGMENT.pt2 INPUTS.safetensors SOC OUT.pte``, where QNN is loaded. Says
what torch makes of the same quantized graph.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from executorch.backends.qualcomm.quantizer.quantizer import QnnQuantizer, QuantDtype
from executorch.backends.qualcomm.serialization.qc_schema import (
    QcomChipset,
    QnnExecuTorchBackendType,
)
from executorch.backends.qualcomm.utils.utils import (
    generate_htp_compiler_spec,
    generate_qnn_executorch_compiler_spec,
    to_edge_transform_and_lower_to_qnn,
)
from safetensors.torch import load_file
from torchao.quantization.pt2e import MinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from handheld_export.measure import snr_db

BLOCK = 16

if __name__ == "__main__":
    program, inputs, soc, out = sys.argv[1:]
    module = torch.export.load(program).module()
    sample = tuple(v for _, v in sorted(load_file(inputs).items()))
    chip = QcomChipset[soc]
    quantizer = QnnQuantizer(
        backend=QnnExecuTorchBackendType.kHtpBackend, soc_model=chip, strict=False
    )
    quantizer.set_default_quant_config(
        QuantDtype.use_16a4w_block,
        is_conv_per_channel=True,
        is_linear_per_channel=True,
        act_observer=MinMaxObserver,
    )
    quantizer.set_block_size_map(
        {
            node.name: (1, BLOCK, 1, 1)
            for node in module.graph.nodes
            if node.target == torch.ops.aten.conv2d.default
            and node.args[1].meta["val"].shape[2:] == (3, 3)
        }
    )
    prepared = prepare_pt2e(module, quantizer)
    with torch.no_grad():
        (wanted,) = module(*sample)
        prepared(*sample)
        quantized = convert_pt2e(prepared)
        (told,) = quantized(*sample)
    spec = generate_qnn_executorch_compiler_spec(chip, generate_htp_compiler_spec(use_fp16=False))
    made = to_edge_transform_and_lower_to_qnn(quantized, sample, spec).to_executorch()
    Path(out).write_bytes(bytes(made.buffer))
    print(f"torch: {snr_db(wanted.numpy(), told.numpy()):.1f} dB", flush=True)
