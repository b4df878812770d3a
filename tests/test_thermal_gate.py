from __future__ import annotations

import itertools

from handheld.records import Heat
from handheld.thermal_gate import Gate, wait


def run(states, **gate):
    now = itertools.count(0)
    clock = [0.0]

    def sleep(seconds):
        clock[0] += seconds

    def heat():
        return states[min(next(now), len(states) - 1)]

    told = []
    seen, figures = wait(
        Gate(**gate), heat, waiting=lambda r, s: told.append(r), sleep=sleep, clock=lambda: clock[0]
    )
    return seen, figures, told


def test_a_cool_device_is_not_waited_for():
    _, figures, told = run([Heat(status=0, battery_celsius=30.0, battery_percent=90)])
    assert figures.passed
    assert figures.waited_s == 0
    assert not told


def test_what_is_not_told_is_not_judged():
    assert run([Heat()])[1].passed


def test_a_hot_device_is_waited_for():
    hot = Heat(status=3, battery_celsius=41.0)
    seen, figures, told = run([hot, hot, Heat(status=0, battery_celsius=36.0)])
    assert figures.passed
    assert figures.waited_s == 10.0
    assert figures.waited_for == ("thermal status 3", "battery at 41.0 °C")
    assert len(told) == 2
    assert seen.status == 0


def test_patience_ends():
    _, figures, _ = run([Heat(status=2)], patience_s=12.0)
    assert not figures.passed
    assert figures.too_hot
    assert figures.waited_s == 12.0


def test_a_flat_battery_that_does_not_charge_is_not_waited_for():
    _, figures, _ = run([Heat(status=0, battery_percent=5, charging=False)])
    assert not figures.passed
    assert not figures.too_hot
    assert figures.waited_s == 0
    charging = Heat(status=0, battery_percent=5, charging=True)
    assert run([charging, Heat(status=0, battery_percent=40)])[1].passed
