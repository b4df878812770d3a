"""Handheld: SDXL on phones. The light part: bundles, harness, benchmarks, reports."""

__version__ = "0.1.0"
