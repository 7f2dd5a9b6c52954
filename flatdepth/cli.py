"""What every command has: options from configuration dataclasses, its end, memory, versions."""

import argparse
import ctypes
import difflib
import errno
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import psutil
from jsonargparse import (
    ArgumentError,
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
    set_parsing_settings,
)

from flatdepth.errors import UserError, is_out_of_memory
from flatdepth.resources import config_file
from flatdepth.untrusted import parse_yaml

Config = TypeVar("Config")


PACKAGES = ("flatdepth", "torch", "accelerate", "kornia", "numpy")

_REFUSALS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENAMETOOLONG,
)

KEEP_BYTES = 1 << 28
"""Free memory at the top of a heap that is kept for the next arrays; there is a heap per thread."""

LARGEST_KEPT_BYTES = 1 << 25
"""Larger arrays go back to the system when they are freed. glibc allows no more than this."""

GRACE_SECONDS = 3.0
"""How long a stopped process waits for its threads, which may hang in a read."""

INTERRUPTING = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = "interrupted by {}; what was finished stays, and nothing half-written\n"

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Types and defaults in the help, the description as it was written."""


class Parser(argparse.ArgumentParser):
    """The options of a command: texts as they are written, a mistake answered with one sentence."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def number(low: float, high: float) -> Callable[[str], Any]:
    """The type of an option that is a number in low..high, a whole one if ``low`` is."""

    def parse(text: str) -> float:
        try:
            value = type(low)(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, got {text!r}")
        return value

    return parse


def names(*known: str) -> Callable[[str], list[str]]:
    """The type of an option that is a list of some of these, with commas."""

    def parse(text: str) -> list[str]:
        given = [name.strip() for name in text.split(",")]
        if unknown := [name for name in given if name not in known]:
            expected = f"expected some of {', '.join(known)}"
            raise argparse.ArgumentTypeError(f"{expected}, got {unknown[0]!r}")
        return given

    return parse


def free_memory() -> int:
    """Bytes that this process can still have: of the machine, its control group, its ulimit -v."""
    own = psutil.Process()
    rooms = [psutil.virtual_memory().available]
    with suppress(OSError, ValueError):  # there is no such file, or it says "max"
        rooms.append(int(_CGROUP_LIMIT.read_text()) - own.memory_info().rss)
    if sys.platform == "linux" and (limit := own.rlimit(psutil.RLIMIT_AS)[0]) > 0:
        rooms.append(limit - own.memory_info().vms)
    return min(rooms)


def called(command: str) -> str:
    """How the user calls a command: ``flatdepth NAME``, or the script of its name."""
    script = Path(sys.argv[0])
    is_ours = script.resolve().parent == Path(__file__).resolve().parent
    as_script = script.name == f"{command}.py" and not is_ours
    return f"python {script}" if as_script else f"flatdepth {command}"


def as_called(command: str, text: str) -> str:
    """A help text that says ``flatdepth NAME``, with the command as the user calls it."""
    return text.replace(f"flatdepth {command}", called(command))


def parse_config(
    kind: type[Config], arguments: Sequence[str], *, prog: str, description: str | None
) -> Config:
    """Build a configuration from ``--config FILE`` and ``--group.key value`` overrides.

    FILE may be the name of a packaged configuration, see ``resources.config_file``.

    Raises:
        UserError: an unknown key, a value of the wrong type or one that the dataclass refuses, or a
            file that is no YAML.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        usage=f"{prog} [--config FILE] [--group.key VALUE ...] [--print_config]",
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below.")
    parser.add_class_arguments(kind)
    keys = sorted(vars(parser.get_defaults().as_flat()).keys() - {"config"})
    arguments = _with_config_files(arguments)
    try:
        parsed = parser.parse_args(arguments)
        if null := next(_nulls(kind, parsed), ""):
            raise UserError(f"{null}: expected a value, found null; leave it out for the default")
        config = parser.instantiate(parsed)
    except ArgumentError as error:
        files = [arg for arg in arguments if arg.endswith((".yaml", ".yml", ".json"))]
        given = [arg.removeprefix("--").partition("=")[0] for arg in arguments if arg[:2] == "--"]
        in_file = files and not any(key in str(error) for key in given if key != "config")
        where = f"{files[-1].removeprefix('--config=')}: " if in_file else ""
        raise UserError(where + _one_sentence(str(error), keys, prog)) from error
    values = {name: value for name, value in vars(config).items() if name != "config"}
    return kind(**values)


def _with_config_files(arguments: Sequence[str]) -> list[str]:
    """The arguments with what ``--config`` names as files."""
    result: list[str] = []
    for argument in arguments:
        if result and result[-1] == "--config":
            result[-1] = f"--config={_checked_file(argument)}"
        elif argument.startswith("--config="):
            result.append(f"--config={_checked_file(argument.removeprefix('--config='))}")
        else:
            result.append(argument)
    return result


def _checked_file(name: str) -> str:
    """The configuration file of that name, if it is YAML that can be read without harm."""
    path = config_file(name)
    try:
        parse_yaml(Path(path).read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not a configuration in YAML ({error})") from error
    except OSError:
        pass  # jsonargparse says what it expects
    return path


def _nulls(kind: Any, values: Namespace, prefix: str = "") -> Iterator[str]:
    """The keys that are null and may not be; jsonargparse lets them pass in a file's groups."""
    for name, hint in get_type_hints(kind).items():
        value, (inner, *_) = values.get(name, ...), get_args(hint) or (hint,)
        if value is None and type(None) not in get_args(hint):
            yield prefix + name
        elif is_dataclass(inner) and value is not ...:
            for entry in value if isinstance(value, list) else [value]:
                yield from _nulls(inner, entry, f"{prefix}{name}.")


def plain_warning(message: Warning | str, *_: object, **__: object) -> str:
    """A warning on one line, without the place in the code; for ``warnings.formatwarning``."""
    return f"warning: {message}\n"


def plain_text(message: str) -> str:
    """jsonargparse's message on one line, in plain words."""
    text = " ".join(message.split())
    text = re.sub(r'Parser key "([^"]+)":', r"\1:", text)
    text = re.sub(r"<class '(\w+)'>", r"\1", text)
    text = re.sub(r"Problem with given class_path '[\w.]+': ", "", text)
    text = text.replace("typing.", "").replace("Expected a ", "expected ")
    text = text.replace("expected dot import path string: ", "expected {path: ...}, got ")
    return text.replace(". Got value: ", ", got ").rstrip(".")


def _one_sentence(message: str, keys: Sequence[str], prog: str) -> str:
    """jsonargparse's message as one line with the key, what was expected, and a suggestion."""
    text = plain_text(message)
    if text.startswith("data.train: ") and "not accepted" not in text:
        return f'{text}; as in --data.train "[{{path: shards/NAME}}]", see {prog} --help'
    unknown = re.search(r"(?:Option|arguments:|Key)\s+'?(?:--)?([\w.]+)'?", text)
    if unknown:
        leaves = {key.rpartition(".")[2]: key for key in keys} | {key: key for key in keys}
        near = difflib.get_close_matches(unknown[1], leaves, n=1, cutoff=0.5)
        if near:
            return f"{text}; did you mean '{leaves[near[0]]}'?"
    return f"{text}; see {prog} --help"


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command line's ``main`` and exit; a ``UserError`` becomes one line and exit code 2.

    So does a file or directory that the user named and that cannot be written or read, and a lack
    of memory. SIGINT and SIGTERM interrupt: one line, and exit code 130 or 143.
    """
    keep_freed_memory()
    once = threading.Lock()

    def tell(number: int) -> int:
        if once.acquire(blocking=False):
            os.write(2, INTERRUPTED.format(signal.Signals(number).name).encode())
        return 128 + number

    try:
        with _interrupted_by_signals(tell):
            code = main()
    except KeyboardInterrupt as interrupt:
        code = tell(interrupt.args[0] if interrupt.args else signal.SIGINT)
        end_soon(code)
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        code = 2
    sys.exit(code or 0)


def _sentence(error: Exception) -> str | None:
    """What an error says to the user; None if it is a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _REFUSALS and error.filename is not None:
        return f"{error.filename}: {error.strerror}; name another place"
    if is_out_of_memory(error):
        return f"out of memory ({' '.join(str(error).split())}); take smaller sizes or batches"
    return None


@contextmanager
def _interrupted_by_signals(tell: Callable[[int], int]) -> Iterator[None]:
    """Within, SIGINT and SIGTERM are a ``KeyboardInterrupt`` with their number.

    It waits for what runs outside of Python, so a thread tells of the signal at once, and ends the
    process if it is still there after ``GRACE_SECONDS``.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        with os.fdopen(reading, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] in INTERRUPTING:  # not SIGCHLD, which DataLoader handles
                    code = tell(number[0])
                    time.sleep(GRACE_SECONDS)
                    os._exit(code)

    def interrupt(number: int, _: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt(number)

    threading.Thread(target=watch, daemon=True).start()
    with os.fdopen(writing, "wb"), signals_to(interrupt, writing):
        yield


@contextmanager
def signals_to(
    handler: Callable[[int, FrameType | None], object], wakeup: int = -1
) -> Iterator[None]:
    """Within, ``handler`` gets SIGINT and SIGTERM, and the file ``wakeup`` their numbers."""
    before = {number: signal.signal(number, handler) for number in INTERRUPTING}
    woken = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        for number, earlier in before.items():
            signal.signal(number, earlier)


def end_soon(code: int) -> None:
    """End the process in ``GRACE_SECONDS`` even if a thread hangs by then; a signal ends it now."""
    for number in INTERRUPTING:
        signal.signal(number, signal.SIG_DFL)
    timer = threading.Timer(GRACE_SECONDS, os._exit, (code,))
    timer.daemon = True
    timer.start()


def cpus() -> int:
    """The number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def local_ranks() -> int:
    """The number of processes of this training on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def keep_freed_memory() -> None:
    """Make glibc keep what arrays free instead of giving it back at once; elsewhere do nothing.

    Images and depth maps come and go at a rate at which the system's clearing of their pages takes
    longer than decoding them. What the user has set in the environment stays as it is.

    Source: mallopt(3), Linux man-pages.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _SETTINGS):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, KEEP_BYTES)
        mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)


def versions() -> dict[str, str]:
    """The versions of the packages that the numbers depend on."""
    return {name: version(name) for name in PACKAGES}
