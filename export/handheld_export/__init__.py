"""Handheld on the build machine: compress, segment, lower and verify."""
