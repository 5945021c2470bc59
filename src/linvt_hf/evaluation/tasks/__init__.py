"""Tasks for lmms-eval: `--include_path` this folder."""
