"""Budgets of memory: how many workers, and which segments beside each other."""

from __future__ import annotations

import pytest

import tiny
from handheld.errors import UsageError
from handheld_export import lowering, memory
from handheld_export.checkpoint import Checkpoint
from handheld_export.memory import IDLE, Budget, need
from handheld_export.segments import group

GB = 10**9


def test_workers_share_what_is_left():
    budget = Budget(4 * GB, 700_000_000)
    assert budget.workers([600_000_000] * 9, 2) == 2
    assert budget.workers([600_000_000] * 9, 1) == 1
    assert budget.workers([600_000_000], 2) == 1
    assert budget.workers([2 * GB, GB], 2) == 1
    assert Budget(32 * GB, GB).workers([GB] * 64, 16) == 16


def test_too_little_is_refused_with_what_would_do():
    budget = Budget(GB, 700_000_000)
    with pytest.raises(UsageError, match="1000 MB is too little") as error:
        budget.workers([600_000_000], 2)
    least = int(str(error.value.remedy).split()[3])
    assert Budget(least * 10**6, 700_000_000).workers([600_000_000], 2) == 1
    assert Budget(GB, 700_000_000, strict=False).workers([600_000_000], 2) == 1


def test_segments_run_beside_each_other_while_there_is_room():
    budget = Budget(4 * GB, 700_000_000)
    assert budget.fits([], 9 * GB, 2)  # alone it always may: workers() has seen to it
    assert budget.fits([600_000_000], 600_000_000, 2)
    assert not budget.fits([600_000_000], 1_000_000_000, 2)


def test_need_grows_with_weights_and_size(tmp_path):
    tiny.vae(**tiny.KL).save_pretrained(tmp_path / "vae")
    tiny.unet(**tiny.SDXL).save_pretrained(tmp_path / "unet")
    checkpoint = Checkpoint(tmp_path)
    small, large = (lowering.lines(checkpoint, (n, n), 8) for n in (8, 32))
    one = group(small.unet, 10**9)[1]
    other = group(large.unet, 10**9)[1]
    assert one.weights == other.weights
    assert need(other, quantized=True) > need(one, quantized=True)
    assert need(one, quantized=False) - need(one, quantized=True) == 9 * one.weights
    # Attention's table over all pixels of the decoder's middle is 2 * 1024 * 1024 * 4 bytes.
    middle = next(s for s in group(large.decoder, 0) if "attentions" in s.units[0].name)
    assert need(middle, quantized=True) > 2 * 1024 * 1024 * 4


def test_memory_given_back_is_seen():
    block = bytearray(200_000_000)
    before = memory.resident()
    del block
    memory.trim()
    assert memory.resident() < before - 150_000_000
    assert memory.available() > IDLE // 10
