"""Wait for a device to be fit for a measurement: cool, charged, left alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Annotated

from pydantic import Field

from handheld.program import Model
from handheld.records import GateFigures, Heat

POLL_S = 5.0


class Gate(Model):
    """What a device must be like before it is measured.

    A device that does not tell something is not judged by it.
    """

    max_status: Annotated[int, Field(ge=0, le=6)] = 0
    """Thermal status on Android's scale, 0 none to 6 shutdown."""
    max_battery_celsius: float = 37.0
    """Heat of the battery; it follows the processor's by minutes."""
    min_battery_percent: Annotated[float, Field(ge=0, le=100)] = 20.0
    """Below it phones slow themselves down."""
    patience_s: Annotated[float, Field(ge=0)] = 600.0
    """How long to wait; then the run goes on and its record says so."""

    def too_hot(self, heat: Heat) -> list[str]:
        """Return what is too hot."""
        reasons = []
        if heat.status is not None and heat.status > self.max_status:
            reasons.append(f"thermal status {heat.status}")
        if heat.battery_celsius is not None and heat.battery_celsius > self.max_battery_celsius:
            reasons.append(f"battery at {heat.battery_celsius:.1f} °C")
        return reasons

    def reasons(self, heat: Heat) -> list[str]:
        """Return why not to measure now."""
        reasons = self.too_hot(heat)
        if heat.battery_percent is not None and heat.battery_percent < self.min_battery_percent:
            reasons.append(f"battery at {heat.battery_percent:.0f} %")
        return reasons


def wait(
    gate: Gate,
    heat: Callable[[], Heat],
    *,
    waiting: Callable[[list[str], float], None] = lambda reasons, seconds: None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Heat, GateFigures]:
    """Wait until a device may be measured, or patience ends.

    Parameters
    ----------
    gate : Gate
    heat : callable
        Returns the device's state now.
    waiting : callable
        Told at every look why, and for how many seconds so far.
    sleep, clock : callable
        Replaced in tests.

    Returns
    -------
    The state at the last look, and what the record says about the wait.
    """
    start = clock()
    first: list[str] = []
    while True:
        now = heat()
        reasons = gate.reasons(now)
        waited = clock() - start
        first = first or reasons
        # Without a charger a flat battery is not going to fill.
        hopeless = bool(reasons) and not gate.too_hot(now) and now.charging is False
        if not reasons or hopeless or waited >= gate.patience_s:
            break
        waiting(reasons, waited)
        sleep(min(POLL_S, max(0.1, gate.patience_s - waited)))
    figures = GateFigures(
        waited_s=round(timedelta(seconds=waited).total_seconds(), 1),
        passed=not reasons,
        waited_for=tuple(first),
        reasons=tuple(reasons),
        too_hot=bool(gate.too_hot(now)),
    )
    return now, figures
