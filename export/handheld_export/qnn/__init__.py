"""Qualcomm's Hexagon NPUs: what the roads to them have in common, and a process with QNN loaded."""
