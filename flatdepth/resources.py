"""What travels with the package: configurations, the demo network and the demo sets."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
ROOT = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent
"""Where ``configs`` and ``shards`` lie: in the installed package, or in the clone beside it."""

CONFIGS = ROOT / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"

DEMO = tuple(
    Path("shards", name)
    for name in (
        "demo_lite0.safetensors",
        "demo_vitt.safetensors",
        "demo_art",
        "rooms-train",
        "flatbench",
    )
)


def config_file(name: str) -> str:
    """The file of a configuration.

    Args:
        name: a path, or the name of a packaged configuration with or without ``configs/`` and
            ``.yaml``.

    Returns:
        ``name`` if it is a file or no packaged configuration has that name, else that one.
    """
    own = Path(name)
    packaged = CONFIGS / f"{own.name.removesuffix('.yaml')}.yaml"
    named = own.parent in (Path(), Path("configs"))
    return str(packaged) if named and not own.is_file() and packaged.is_file() else name


def demo_file(path: str) -> str:
    """``path``, or the package's copy of a demo file that is not there."""
    return str(ROOT / path) if Path(path) in DEMO and not Path(path).exists() else path
