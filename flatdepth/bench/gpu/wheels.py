"""The wheels that a GPU machine without network lacks, and the lines that install them there."""

import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flatdepth.errors import UserError

PYTHON = "3.12"
PRESENT = (
    "torch",
    "torchvision",
    "accelerate",
    "numpy",
    "h5py",
    "safetensors",
    "transformers",
    "peft",
    "matplotlib",
    "tensorboard",
)
"""What the machine has, each with its own dependencies."""

EXTRAS = ("8bit",)
BUILD = "setuptools>=77"
"""Builds flatdepth itself there; a virtual environment of Python 3.12 has none."""

PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_24_x86_64", "manylinux_2_28_x86_64")
LARGEST_MB = 60.0

Wanted = tuple[str, frozenset[str]]


def missing(pyproject: Path) -> list[str]:
    """The packages that flatdepth needs and ``PRESENT`` does not bring, as ``name==version``.

    The versions are those installed here.

    Raises:
        UserError: one is not installed here.
    """
    project = tomllib.loads(pyproject.read_text("utf-8"))["project"]
    lines = [*project["dependencies"]]
    for extra in EXTRAS:
        lines += project["optional-dependencies"][extra]
    wanted = _closure(_parsed(lines, frozenset()))
    present = _closure((name, frozenset()) for name in PRESENT)
    names = sorted({name for name, _ in wanted} - {name for name, _ in present})
    try:
        return [f"{name}=={version(name)}" for name in names] + [BUILD]
    except PackageNotFoundError as error:
        raise UserError(
            f"--wheels takes the versions that are installed here, and {error.name} is not; "
            "pip install -e '.[test]'"
        ) from error


def download(pyproject: Path, folder: Path) -> str:
    """Download the missing wheels into a folder and return the two lines that install them.

    The lines are also in ``folder``/install.sh. They are for a shell in the repository's root.

    Raises:
        UserError: a wheel cannot be had, or all together are larger than ``LARGEST_MB``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp"]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    done = subprocess.run(
        [*command, f"--dest={folder}", *missing(pyproject)], capture_output=True, text=True
    )
    if done.returncode:
        last = done.stderr.strip().rsplit("\n", 1)[-1]
        raise UserError(f"--wheels: pip download failed: {last}")
    size_mb = sum(wheel.stat().st_size for wheel in folder.glob("*.whl")) / 1e6
    if size_mb > LARGEST_MB:
        raise UserError(
            f"--wheels: {folder} holds {size_mb:.1f} MB of wheels, at most {LARGEST_MB:g} MB were "
            "expected; name a new directory if older ones lie there"
        )
    install = "python -m pip install --no-index --no-deps"
    lines = f"{install} {folder}/*.whl\n{install} --no-build-isolation -e .\n"
    (folder / "install.sh").write_text(lines)
    return lines


def _parsed(lines: Iterable[str], extras: frozenset[str]) -> Iterable[Wanted]:
    """Names and extras of the requirements that hold on the machine."""
    machine = {
        "python_version": PYTHON,
        "python_full_version": f"{PYTHON}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
    }
    for line in lines:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(
            marker.evaluate({**machine, "extra": extra}) for extra in (*extras, "")
        ):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


def _closure(wanted: Iterable[Wanted]) -> set[Wanted]:
    """The packages and all that they need; those not installed here need nothing."""
    found: set[Wanted] = set()
    pending = list(wanted)
    while pending:
        name, extras = pending.pop()
        if (name, extras) in found:
            continue
        found.add((name, extras))
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        pending += _parsed(lines, extras)
    return found
