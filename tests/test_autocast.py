from __future__ import annotations

import pytest
import torch

from handheld_export.autocast import autocast, computes_bf16


@pytest.mark.parametrize("native", [True, False])
def test_a_cpu_computes_in_bfloat16_only_if_it_has_it(monkeypatch, native):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    assert computes_bf16(torch.device("cpu")) is native
    with autocast():
        found = torch.ones(2, 2) @ torch.ones(2, 2)
    assert found.dtype is (torch.bfloat16 if native else torch.float32)


def test_devices_that_are_not_known_compute_as_they_are():
    assert not computes_bf16(torch.device("meta"))
