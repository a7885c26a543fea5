"""Which code and which libraries a number was made with."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "lightning", "torchmetrics", "torch-fidelity", "nfdm-lightning")


def commit(folder: Path | None = None) -> str | None:
    """Returns the git commit of the package's source, marked if it was changed since; None where it is not from git.

    Args:
        folder: where the source is; by default that of this package.
    """
    folder = Path(__file__).resolve().parent if folder is None else folder
    source = Path(__file__).name
    try:
        # an installed package may lie inside the repository of another project, which ignores it
        _git(folder, "ls-files", "--error-unmatch", source)
        head, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--untracked-files=no", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + (" with changes" if changes else "")


def _git(folder: Path, *command: str) -> str:
    done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def settings_of(part: object) -> dict[str, Any]:
    """Returns the settings of a solver or estimator as plain data: its attributes, and those of this package's parts in it.

    Of anything else it holds, such as a tensor, only the class is named.
    """
    found: dict[str, Any] = {}
    for name, value in vars(part).items():
        if value is None or isinstance(value, (bool, int, float, str)):
            found[name] = value
        elif type(value).__module__.startswith(f"{__package__}."):
            found[name] = {"class": type(value).__name__, **settings_of(value)}
        else:
            found[name] = {"class": type(value).__name__}
    return found


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            found[package] = "not installed"
    return found
