"""`linvt publish`: checks a folder as a stranger will find it, shows what would go up, and uploads it."""

import ast
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import yaml
from huggingface_hub import HfApi, ModelCard, parse_eval_result_entries

from ..training.adapter_files import ADAPTER_FILE, LORA_CONFIG, is_adapter

_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".msgpack"}
_TEXTS = {".json", ".jsonl", ".md", ".py", ".jinja", ".yaml", ".yml", ".txt", ".cfg", ".toml", ""}
_LARGEST_TEXT = 16_000_000  # bytes of a file by another ending that may be a text
_VOCABULARIES = {"tokenizer.json", "vocab.json", "merges.txt"}  # whose words may look like paths
# What the Hub itself, or an editor, leaves in a folder.
_LEFT_BEHIND = {".git", ".cache", "__pycache__", ".ipynb_checkpoints", ".DS_Store"}
_PATHS = re.compile(
    r"(?<![\w/.:])(?:/(?:home|root|Users|mnt|tmp|data|work|workspace|scratch)/[\w./-]+|[A-Z]:\\\\?\w+)"
)
_SECRETS = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "an OpenAI key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "an AWS key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
_FRESH = """
import sys
sys.modules["linvt_hf"] = None  # from here on importing the package fails: the folder must do alone
from transformers import pipeline

answer = pipeline("video-question-answering", model=sys.argv[1], trust_remote_code=True)
print(repr(answer(video=sys.argv[2], question="What happens?", max_new_tokens=8, do_sample=False)[0]["answer"]))
"""


@dataclass(frozen=True)
class Report:
    """What would go up, with bytes; what is wrong; and what the model answered about a video."""

    files: dict[str, int]
    problems: list[str]
    answer: str | None


def check_folder(folder: Path, say: Callable[[str], None] = lambda text: None) -> Report:
    """
    Looks at a folder with a whole model, or with adapters, as somebody who has it from the Hub.

    Every problem is a sentence that names the file. Raises `FileNotFoundError` if there is no such folder or model.
    """
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"There is no model in {folder}: it has no config.json.")
    adapter = is_adapter(folder)
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _LEFT_BEHIND & set(path.relative_to(folder).parts)
    }
    problems = []
    for check in (_pickles, _jsons, _weights, _texts, _card, _results, _base if adapter else _modules):
        problems += check(folder, files)
    answer = None
    if problems:
        say("not loaded, since it has problems")
    else:
        say("loading it in a fresh process" + ("" if adapter else " without this package"))
        answer, problem = _ask(folder, adapter)
        problems += [problem] if problem else []
    return Report(files, problems, answer)


def publish(folder: Path, repo: str, *, private: bool = False, message: str | None = None) -> str:
    """Uploads a folder that was checked; returns its address. Needs a token with the right to write."""
    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    ignored = [pattern for name in sorted(_LEFT_BEHIND) for pattern in (name, f"{name}/*", f"**/{name}/*")]
    info = api.upload_folder(
        repo_id=repo, folder_path=folder, commit_message=message or "Upload a LinVT model", ignore_patterns=ignored
    )
    return str(info.commit_url)


# ---- checks ----


def _pickles(folder: Path, files: dict[str, int]) -> list[str]:
    return [
        f"{name} may hold a pickle, which can run anything where it is loaded; save weights as safetensors."
        for name in files
        if Path(name).suffix.lower() in _PICKLES
    ]


def _jsons(folder: Path, files: dict[str, int]) -> list[str]:
    problems = []
    for name in files:
        if name.endswith(".json"):
            try:
                held = json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                problems.append(f"{name} is no whole JSON file: {error}.")
                continue
            read = name in ("config.json", ADAPTER_FILE, LORA_CONFIG) or name.endswith(".index.json")
            if read and not isinstance(held, dict):
                problems.append(f"{name} must hold an object with fields, and holds {type(held).__name__}.")
    return problems


def _fields(folder: Path, name: str) -> dict | None:
    """What a JSON file holds; None for one that `_jsons` names."""
    try:
        held = json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError:
        return None
    return held if isinstance(held, dict) else None


def _weights(folder: Path, files: dict[str, int]) -> list[str]:
    problems = []
    found = [name for name in files if name.endswith(".safetensors")]
    if not found:
        problems.append("There are no weights: no .safetensors file.")
    for name in found:
        try:
            with safetensors.safe_open(folder / name, "pt") as file:
                file.keys()
        except safetensors.SafetensorError as error:
            problems.append(f"{name} cannot be read: {error}.")
    for name in files:
        if name.endswith(".index.json") and (index := _fields(folder, name)) is not None:
            weights = index.get("weight_map")
            if not isinstance(weights, dict):
                problems.append(f"{name} has no weight_map, which says where each tensor is.")
                continue
            needed = set(map(str, weights.values()))
            problems += [f"{name} needs {each}, which is not there." for each in sorted(needed - files.keys())]
    return problems


def _texts(folder: Path, files: dict[str, int]) -> list[str]:
    """Paths of somebody's machine, and secrets."""
    problems = []
    for name in files:
        known = Path(name).suffix.lower() in _TEXTS
        if not known and files[name] > _LARGEST_TEXT:
            continue
        try:
            text = (folder / name).read_text(encoding="utf-8", errors="replace" if known else "strict")
        except UnicodeDecodeError:
            continue  # no text
        for number, line in enumerate(text.splitlines(), 1):
            if Path(name).name not in _VOCABULARIES and (match := _PATHS.search(line)):
                problems.append(f"{name}, line {number}, holds a path of a machine: {match[0]}.")
            problems += [
                f"{name}, line {number}, holds {what}." for what, pattern in _SECRETS.items() if pattern.search(line)
            ]
    return problems


def _card(folder: Path, files: dict[str, int]) -> list[str]:
    if "README.md" not in files:
        return ["There is no README.md, which is the model's card."]
    try:
        data = ModelCard.load(folder / "README.md", ignore_metadata_errors=False).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        return [f"The metadata of README.md cannot be read: {' '.join(str(error).split())}."]
    wanted = {"library_name": None, "pipeline_tag": "video-text-to-text", "license": None}
    problems = [
        f"README.md has no {name} in its metadata, the lines between --- at its top; add it."
        for name in wanted
        if not data.get(name)
    ]
    tag = data.get("pipeline_tag")
    if tag and tag != wanted["pipeline_tag"]:
        problems.append(f"README.md has pipeline_tag {tag}, and a LinVT model's is {wanted['pipeline_tag']}.")
    return problems


def _results(folder: Path, files: dict[str, int]) -> list[str]:
    problems = []
    for name in files:
        if name.startswith(".eval_results/"):
            try:
                parse_eval_result_entries(yaml.safe_load((folder / name).read_text(encoding="utf-8")))
            except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
                problems.append(f"{name} is no result that the Hub reads: {error!r}.")
    return problems


def _base(folder: Path, files: dict[str, int]) -> list[str]:
    """Of adapters."""
    content = _fields(folder, ADAPTER_FILE)
    if content is None or content.get("base_model"):
        return []
    return [
        f"{ADAPTER_FILE} names no base on the Hub, and nobody else has {content.get('local_base')}; publish that and "
        "train on its Hub id, or merge the two and publish the whole."
    ]


def _modules(folder: Path, files: dict[str, int]) -> list[str]:
    """Python files that the config names, and those that they import."""
    config = _fields(folder, "config.json")
    if config is None:
        return []
    if not config.get("auto_map"):
        return ["config.json has no auto_map: a whole model brings its code; save it with save_pretrained."]
    try:
        named = {str(name).split("--")[-1].split(".")[0] for name in config["auto_map"].values()}
        named |= {pipe["impl"].split(".")[0] for pipe in config.get("custom_pipelines", {}).values()}
    except (AttributeError, KeyError, TypeError) as error:
        return [f"config.json has an auto_map or custom_pipelines that names no code: {error!r}."]
    problems = [
        f"config.json names {name}.py, which is not there." for name in sorted(named) if f"{name}.py" not in files
    ]
    for name in files:
        if not name.endswith(".py"):
            continue
        try:
            tree = ast.parse((folder / name).read_text(encoding="utf-8"))
        except (SyntaxError, ValueError) as error:  # the second for what is no UTF-8
            problems.append(f"{name} is no Python: {error}.")
            continue
        wanted = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}
        problems += [
            f"{name} imports {module}.py, which is not there."
            for module in sorted(filter(None, wanted))
            if f"{module}.py" not in files
        ]
    return problems


def _ask(folder: Path, adapter: bool) -> tuple[str | None, str | None]:
    """The model's answer about a video, or what went wrong."""
    with tempfile.TemporaryDirectory() as scratch:
        video = Path(scratch) / "video.mp4"
        _write_video(video)
        command = [sys.executable, "-c", _FRESH, str(folder), str(video)]
        if adapter:  # whose base and code are elsewhere
            command = [sys.executable, "-m", "linvt_hf.cli", "ask", str(folder), str(video), "What happens?"]
            command += ["--max-new-tokens", "8"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return None, f"It cannot be loaded and asked in a fresh process: {lines[-1] if lines else done.returncode}"
    return done.stdout.strip(), None


def _write_video(path: Path) -> None:
    """Two seconds of a square that moves."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(16):
            picture = np.full((64, 64, 3), 40, dtype=np.uint8)
            picture[24:40, 2 * number : 2 * number + 16] = (240, 220, 50)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
