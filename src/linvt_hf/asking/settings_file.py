"""What a folder of results was made with, so that a run that goes on there is the same."""

import json
from pathlib import Path


def keep_settings(file: Path, settings: dict) -> None:
    """
    Writes settings, or checks that those of an earlier run are the same. Raises `ValueError` naming what differs, with
    both values.
    """
    now = json.loads(json.dumps(settings))  # as they come back
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        if changed := [name for name in now if now[name] != before.get(name, now[name])]:
            was = "; ".join(f"{name} was {before[name]} and is {now[name]}" for name in changed)
            raise ValueError(f"{file.parent} holds results of other settings ({was}); give another folder.")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
