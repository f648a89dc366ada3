"""Runs the tests that need no models on another Python: ``python scripts/test_on.py python3.13``.

In a copy of the tracked files, because a build in place belongs to one Python and one torch.
"""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
NEEDED = ("torch", "nvidia-", "ninja", "setuptools", "pytest", "hypothesis", "uvloop")
TESTS = ("tests/unit", "tests/model", "tests/guide")


def main(python: str) -> None:
    """Set up, build, test; the first failure ends it."""
    name = Path(python).name
    environment, copy = ROOT / f".venv/{name}", ROOT / "build" / name
    interpreter = environment / "bin/python"
    if not interpreter.exists():
        run(python, "-m", "venv", str(environment))
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        pins: list[str] = project["project"]["optional-dependencies"]["dev"]
        pip = [str(interpreter), "-m", "pip", "install", "--quiet"]
        needed = [pin.split("#")[0] for pin in pins if pin.startswith(NEEDED)]
        run(*pip, *(pin for pin in needed if pin.startswith("torch==")))
        run(*pip, "numpy", *needed)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    copy.mkdir(parents=True, exist_ok=True)
    for old in copy.iterdir():  # what is gone must be gone there, too
        if old.name == "build":
            continue
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink()
    for file in listed.splitlines():
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, copy / file)
    run(str(interpreter), "setup.py", "-q", "build_ext", "--inplace", cwd=copy)
    run(str(interpreter), "-m", "pytest", "-q", *TESTS, cwd=copy)


def run(*command: str, cwd: Path = ROOT) -> None:
    """Run a command; a failure ends this program with its status."""
    status = subprocess.run(command, cwd=cwd, check=False).returncode
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1])
