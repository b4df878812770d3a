from __future__ import annotations

import pytest

from handheld import socs


@pytest.mark.parametrize(
    ("soc", "arch"),
    [("SM8650", 75), ("sm8650-ac", 75), ("QTI SM8650", 75), ("Qualcomm SM8750-AC", 79),
     ("SM8750", 79), ("SM 8550", 73), ("Tensor G3", None),
     ("SM86500", None), (None, None)],
)  # fmt: skip
def test_architectures(soc, arch):
    assert socs.hexagon(soc) == arch


def test_libraries_go_where_they_run():
    files = ["libQnnHtp.so", "libQnnSystem.so", "libQnnHtpV75Skel.so", "libQnnHtpV75Stub.so",
             "libQnnHtpV79Skel.so", "libQnnHtpV79Stub.so", "handheld-harness"]  # fmt: skip
    assert [f for f in files if socs.is_for(f, "SM8650")] == [*files[:4], files[6]]
    assert [f for f in files if socs.is_for(f, "Tensor G3")] == files
    assert [f for f in files if socs.is_skel(f)] == [files[2], files[4]]
