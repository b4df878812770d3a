"""Core ML: packages, rewrites for the Neural Engine, and an evaluator of ML programs."""
