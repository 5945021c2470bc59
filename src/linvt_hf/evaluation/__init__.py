"""Evaluation: benchmarks by lmms-eval, what an answer is worth, and how sure that is. Stays at home."""
