"""Evaluation: benchmarks by lmms-eval, what an answer is worth, and how sure that is. Stays at home."""

MISSING = (
    "Evaluation needs more packages ({}): pip install 'linvt_hf[eval]', and lmms-eval by itself, "
    "pip install --no-deps 'lmms-eval>=0.7.3'."
)
