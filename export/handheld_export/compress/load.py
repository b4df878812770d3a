"""What training asks of memory and time, estimated before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from handheld import counting
from handheld.planning import Shape
from handheld_export.compress.engine import Loop

SAVED_BYTES = 2.6
"""What the backward pass keeps per element that a layer gives, in bytes: bfloat16 inputs of
layers and float32 inputs of norms. Measured with saved-tensor hooks: 2.6 on critter's U-Net,
2.0 on one of SDXL's layout with a fifth of its channels."""
RECOMPUTED_BYTES = 1.2
"""The same with gradient checkpointing: inputs of blocks, and one block's insides (1.1, 0.3)."""
MASTER_BYTES = 16
"""Of a trained parameter: weight, gradient and two moments in float32."""
AVERAGE_BYTES, CAST_BYTES = 4, 2
RESERVE = 1.1
"""Room for kernels' work space and for fragmentation."""


@dataclass(frozen=True)
class Cluster:
    """What would train.

    Parameters
    ----------
    devices : int
    memory : float
        Bytes of each device.
    flops : float
        Sustained FLOP/s of each device in training, an assumption of the user's.
    fsdp : bool
        Shard trained parameters and their optimizer states.
    """

    devices: int = 1
    memory: float = 80e9
    flops: float = 200e12
    fsdp: bool = False


@dataclass(frozen=True)
class Load:
    """What a step asks of the hardware.

    Parameters
    ----------
    trained : tuple of int
        Parameters of each network in training; the first is averaged too.
    frozen : tuple of int
        Parameters of networks that only run forward.
    saved : float
        Elements that the layers of the largest backward pass give, batch 1.
    macs : float
        Multiply-accumulates of the whole step.
    loop : Loop or None
        None where nothing is trained.
    """

    trained: tuple[int, ...] = ()
    frozen: tuple[int, ...] = ()
    saved: float = 0
    macs: float = 0
    loop: Loop | None = None

    def memory(self, cluster: Cluster) -> float:
        """Return the bytes that one device needs."""
        share = cluster.devices if cluster.fsdp else 1
        states = sum(self.trained) * MASTER_BYTES + sum(self.trained[:1]) * AVERAGE_BYTES
        # Sharded networks gather one block at a time; the casts last while they are used.
        casts = max((*self.trained, *self.frozen), default=0) * CAST_BYTES / share
        frozen = sum(self.frozen) * CAST_BYTES
        batch = 1.0 if self.loop is None else self.loop.batch / cluster.devices
        kept = RECOMPUTED_BYTES if self.loop and self.loop.checkpointing else SAVED_BYTES
        if self.loop is None:
            kept = 0.0
        return RESERVE * (states / share + casts + frozen + batch * kept * self.saved)

    def seconds(self, cluster: Cluster) -> float:
        """Return the time of the step."""
        return 2 * self.macs / (cluster.flops * cluster.devices)


def macs(shape: Shape) -> float:
    """Return the multiply-accumulates of one U-Net run at batch 1."""
    return float(counting.summary(shape.layers)["macs"])


def params(shape: Shape) -> int:
    """Return the U-Net's parameters."""
    return int(counting.summary(shape.layers)["params"])


def outputs(layers: Sequence[counting.Layer]) -> float:
    """Return the elements that layers give."""
    return float(sum(x.outputs for x in layers))


def passes(loop: Loop) -> int:
    """Return what training costs in forward passes: forward, backward, and the recomputed one."""
    return 4 if loop.checkpointing else 3
