"""
`make conformance`: the common tests that transformers ships in its source distribution, against our classes.

Takes the source distribution of the installed version from the package index (or `--sdist`), unpacks its tests into
the user's cache, and runs the `conformance_*.py` modules beside this file on them. Further arguments go to pytest.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "linvt_hf" / "conformance"

# The source distribution holds only the first level of upstream's tests. What its modules import from elsewhere is
# written here as far as they need it; nothing of it is written where upstream ships its own.
STAND_INS = {
    "tests/__init__.py": "",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    # Upstream's media are on the Hub; conftest.py writes files of the same names.
    "utils/fetch_hub_objects_for_ci.py": (
        "import os\n\n\n"
        "def url_to_local_path(url, *args, **kwargs):\n"
        "    return os.path.join(os.environ['LINVT_CONFORMANCE_MEDIA'], url.rsplit('/', 1)[-1])\n"
    ),
}


def download(version: str, folder: Path) -> Path:
    """The source distribution of a version, by pip, from whichever index pip is set up with."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", ":all:", "--no-build-isolation", f"transformers=={version}", "--dest", str(folder)]
    subprocess.run(command, check=True)
    return folder / f"transformers-{version}.tar.gz"


def unpack(archive: Path, folder: Path) -> None:
    """The archive's tests into `folder`/tests, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, tarfile.open(archive) as tar:
        members = [member for member in tar if member.isfile() and member.name.split("/")[1] == "tests"]
        if not members:
            raise SystemExit(f"{archive} holds no tests folder.")
        tar.extractall(scratch, members=members, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        shutil.rmtree(folder, ignore_errors=True)
        Path(scratch, members[0].name.split("/")[0]).rename(folder)


def upstream_tests(version: str, sdist: Path | None) -> Path:
    """A folder with upstream's `tests`, completed with the stand-ins."""
    folder = CACHE / f"transformers-{version}"
    if sdist is not None:
        if f"transformers-{version}" not in sdist.name:
            print(f"Note: transformers {version} is installed, the tests come from {sdist.name}.", file=sys.stderr)
        if sdist.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(sdist / "tests", folder / "tests")
        else:
            unpack(sdist, folder)
    elif not (folder / "tests" / "test_modeling_common.py").exists():
        with tempfile.TemporaryDirectory() as scratch:
            unpack(download(version, Path(scratch)), folder)
    for name, text in STAND_INS.items():
        path = folder / name
        # What an earlier run wrote is written anew.
        if not path.exists() or path.stat().st_size < 1000:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, help="the source distribution, as an archive or unpacked")
    arguments, for_pytest = parser.parse_known_args()

    upstream = upstream_tests(transformers.__version__, arguments.sdist)
    with tempfile.TemporaryDirectory() as scratch:
        path = [str(upstream), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "HF_HOME": str(Path(scratch, "hf")),
            "HF_HUB_OFFLINE": "1",
            "LINVT_CONFORMANCE_MEDIA": str(Path(scratch, "media")),
            "TMPDIR": scratch,  # upstream's processor tests leave their folders behind
        }
        command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), str(HERE), *for_pytest]
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
