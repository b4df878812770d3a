"""From ONNX graphs to QNN context binaries, by onnxruntime; runs where QNN is loaded.

What comes out is an ONNX graph of one EPContext node that holds the binary.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from handheld.errors import TargetError
from handheld.qnn import LIBRARIES
from handheld.socs import HEXAGON

_SOC_MODEL: Final = {"SM8550": 43, "SM8650": 57, "SM8750": 69}
"""QNN's own numbers."""
_ROUNDS_WEIGHTS: Final = "WeightBiasQuantization"
"""onnxruntime's pass that puts float weights between two grids on one of 8 bits, for a tensor."""


@cache
def _device() -> Any:
    """Register QNN's provider and return the device that it gives."""
    import onnxruntime as ort

    provider = _libraries() / "libonnxruntime_providers_qnn.so"
    ort.register_execution_provider_library("QNN", str(provider))
    return next(d for d in ort.get_ep_devices() if d.ep_name == "QNN")


def _libraries() -> Path:
    return Path(os.environ["QNN_SDK_ROOT"]) / LIBRARIES


def session(
    model: Path | bytes,
    provider: Mapping[str, str] | None = None,
    entries: Mapping[str, str] | None = None,
) -> Any:
    """Open a graph with QNN's provider.

    Parameters
    ----------
    model : Path or bytes
    provider, entries : mapping, optional
        Options of QNN's provider and of the session; by default, all operators must go to QNN.

    Returns
    -------
    onnxruntime.InferenceSession
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    for name, value in (entries or {"session.disable_cpu_ep_fallback": "1"}).items():
        options.add_session_config_entry(name, value)
    backend = {"backend_path": str(_libraries() / "libQnnHtp.so"), **(provider or {})}
    options.add_provider_for_devices([_device()], backend)
    return ort.InferenceSession(
        model if isinstance(model, bytes) else str(model),
        options,
        disabled_optimizers=[_ROUNDS_WEIGHTS],
    )


def compile_for(soc: str, source: Path, path: Path) -> dict[str, Any]:
    """Compile a graph for an NPU.

    Parameters
    ----------
    soc : str
        For example ``SM8650``.
    source, path : Path
        What to read and to write.

    Returns
    -------
    dict
        Nothing.

    Raises
    ------
    TargetError
        If the NPU does not take all of it.
    """
    import onnx

    provider = {
        "soc_model": str(_SOC_MODEL[soc]),
        "htp_arch": str(HEXAGON[soc]),
        "enable_htp_fp16_precision": "1",
        "offload_graph_io_quantization": "0",  # at the ends, too, what converts is the NPU
        "htp_graph_finalization_optimization_mode": "3",
    }
    entries = {
        "ep.context_enable": "1",
        "ep.context_embed_mode": "1",
        "ep.context_file_path": str(path),
    }
    path.unlink(missing_ok=True)
    # Opened by its path, a graph would have a hash of that in its name.
    session(onnx.load(str(source)).SerializeToString(), provider, entries)
    if not path.is_file():
        raise TargetError("QNN's provider takes nothing of it")
    kinds = [node.op_type for node in onnx.load(str(path)).graph.node]
    if kinds != ["EPContext"]:
        outside = sorted({*kinds} - {"EPContext"})
        raise TargetError(
            f"is {kinds.count('EPContext')} graphs for the NPU, with operators outside: "
            f"{', '.join(outside) or 'none'}"
        )
    return {}
