"""Compression: a recipe of steps that turns a checkpoint into a student.

A **step** (one file in :mod:`handheld_export.compress.steps`) takes a student and gives a
student. A **recipe** (TOML) names steps in order with their settings, data and seeds. The student
records every step that made it.
"""
