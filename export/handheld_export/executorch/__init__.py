"""ExecuTorch: programs that are one XNNPACK delegate, and files that share weights."""
