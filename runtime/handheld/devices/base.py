"""The seam between handheld and a kind of device.

A kind of device is one file with a subclass of :class:`Devices`, which finds attached
devices, and one of :class:`Device`, found by the entry point group ``handheld.devices``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

from handheld.bundle import Bundle
from handheld.protocol import AnyEvent, Job
from handheld.records import DeviceFacts, Heat, Transfer


@dataclass(frozen=True)
class Received:
    """An event and when it arrived, in milliseconds since the harness was started."""

    event: AnyEvent
    since_spawn_ms: float


@dataclass(frozen=True)
class Obstacle:
    """Why a device, or a whole kind of device, cannot be used, and what helps."""

    what: str
    remedy: str
    device: str | None = None
    """Serial number of the device; None for the kind."""

    def __str__(self) -> str:
        where = f"{self.device}: " if self.device else ""
        return f"{where}{self.what} ({self.remedy})"


Sending = Callable[[str, int, int], None]
"""Told what is on its way to a device: ``sending(name, bytes_done, bytes_total)``."""


class Place(ABC):
    """A bundle on a device, ready to run; what a context manager gives and cleans up."""

    transfer: Transfer | None = None
    """What had to be sent; None where nothing is ever sent."""

    @abstractmethod
    def run(self, job: Job, timeout_s: float | None = None) -> Generator[Received, None, None]:
        """Run the harness and yield what it says as it says it.

        Paths in the job are those of this machine. A device with other ones sends the
        bundle's files and ``job.inputs`` there, and brings ``job.output`` and
        ``job.dump_calls`` back before the last event is yielded. ``job.cache`` is a name
        for a folder on the device. Closing the generator ends the harness.

        Raises
        ------
        HarnessError
            If the harness cannot be started, says that it failed, dies, or takes longer than
            ``timeout_s``. Events until then have been yielded.
        """

    @abstractmethod
    def forget_cache(self, cache: str) -> None:
        """Remove the packed weights that ``job.cache`` named."""


class Device(ABC):
    """One attached device."""

    id: str
    kind: ClassVar[str]
    serial: str | None = None
    """What its own tools call it. Shown on this machine, never recorded."""

    @abstractmethod
    def facts(self) -> DeviceFacts:
        """Return what the device is, with the engines of its harness."""

    @abstractmethod
    def heat(self) -> Heat:
        """Return the thermal state now."""

    def contact(self) -> None:
        """Find out whether the device is there and can be used.

        Raises
        ------
        DeviceError
            If it is not, or cannot.
        """
        self.heat()

    def tidy(self) -> None:  # noqa: B027 (a kind that leaves nothing need not)
        """Remove what a run of this machine left that could not clean up, if nobody else runs.

        Raises
        ------
        DeviceError
            If the device is not there.
        """

    def glance(self) -> Heat | None:
        """Return the thermal state while a job runs, or None if to look would disturb it."""
        return self.heat()

    def others_s(self) -> float | None:
        """Return the processor seconds that other processes have used, or None if unknown."""
        return None

    @abstractmethod
    def prepare(
        self, bundle: Bundle, sending: Sending = lambda name, done, total: None
    ) -> AbstractContextManager[Place]:
        """Bring a bundle and the harness to the device, sending only what it lacks.

        Whatever an earlier, broken run left there is removed first. On leaving, all is
        removed but the cache of sent files and packed weights.

        Raises
        ------
        HarnessError
            If the harness is not built for it.
        DeviceError
            If the device is gone or its space does not suffice.
        """


class Devices(ABC):
    """A kind of device."""

    @abstractmethod
    def attached(self) -> list[Device]:
        """Return the devices at hand."""

    @abstractmethod
    def obstacles(self) -> list[Obstacle]:
        """Return what keeps this kind, or an attached device of it, from being used."""
