"""Pack raw data into shard sets, and look after shard sets. See ``flatdepth pack --help``."""

import re
import warnings
from typing import NoReturn

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from flatdepth.cli import as_called, called, cpus, plain_text, plain_warning
from flatdepth.data import pack, parts, sets
from flatdepth.data.readers import READERS
from flatdepth.errors import UserError

PHOTOS = "photos"
PHOTOS_TEXT = "photographs without depth: that of a teacher network, and planes where labelled"

OVERVIEW = """\
usage: flatdepth pack COMMAND ...

Pack raw data into a shard set (flatdepth pack COMMAND --help lists the options):
{readers}

Look after shard sets:
  merge     join the parts packed with --part i/n
  verify    check every byte of a set
  reindex   give a set of an earlier version the index of this one
  ls        list the sets at and below a directory
  export    write a set as plain image, 16-bit PNG depth and camera files
  push      show what would go to the Hugging Face Hub; with --yes, send it

Example:
  flatdepth pack hypersim --raw /data/hypersim --out shards/hypersim

Exit code: 0 done; 1 done, but damaged frames were left out or found, each is named; 2 a mistake.
"""


class Parser(ArgumentParser):
    """An argument parser that answers a mistake with one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(f"{plain_text(message)} (see: {self.prog} --help)") from ex


def main(argv: list[str]) -> int:
    warnings.formatwarning = plain_warning
    if not argv or argv[0] in ("-h", "--help"):
        texts = {name: text for name, (_, text) in READERS.items()} | {PHOTOS: PHOTOS_TEXT}
        rows = "\n".join(f"  {name:<10}{text}" for name, text in texts.items())
        print(as_called("pack", OVERVIEW.format(readers=rows)))
        return 0
    command, arguments = argv[0], argv[1:]
    commands = {
        "merge": _merge,
        "verify": _verify,
        "reindex": _reindex,
        "ls": _ls,
        "export": _export,
        "push": _push,
    }
    if command in (*READERS, PHOTOS):
        return _pack(command, arguments)
    if command in commands:
        return commands[command](arguments)
    names = ", ".join([*READERS, PHOTOS, *commands])
    raise UserError(f"unknown command {command!r}; choose one of {names}")


def _pack(name: str, argv: list[str]) -> int:
    reader_class, text = _reader_class(name)
    if name == "list" and argv and not argv[0].startswith("-"):
        argv = ["--file", *argv]
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _parser(name, f"Pack {text}.")
    generated = {"raw"} if name == "rooms" else set()
    parser.add_class_arguments(reader_class, skip=generated)
    packing = parser.add_argument_group("Packing")
    packing.add_argument("--out", type=str, required=True, help="Directory or URL of the set.")
    alone = name == PHOTOS  # every process would open the teacher, which has threads of its own
    packing.add_argument(
        "--workers",
        type=int,
        default=1 if alone else None,
        help=f"Processes; by default one{'' if alone else ' per CPU'}.",
    )
    packing.add_argument("--part", type=str, help="i/n: pack only the i-th of n parts; then merge.")
    packing.add_argument(
        "--parts", type=int, help="Pack all of so many parts, and merge them; resumes what is left."
    )
    packing.add_argument(
        "--engine", choices=parts.ENGINES, default="local", help="Who packs the parts."
    )
    packing.add_argument(
        "--address", type=str, help="HOST:PORT or 'auto': a Ray cluster; else this machine."
    )
    packing.add_argument("--shard_mb", type=float, default=256.0, help="Size limit of a shard.")
    packing.add_argument(
        "--min_valid", type=float, default=0.01, help="Least share of pixels with known depth."
    )
    packing.add_argument("--level", type=int, default=12, help="zstd level of depth, 1..22.")
    options = parser.parse_args([_bracketed(word) for word in argv]).as_dict()
    packed = {key: options.pop(key) for key in ("out", "workers", "shard_mb", "min_valid", "level")}
    part = options.pop("part")
    in_parts = {key: options.pop(key) for key in ("parts", "engine", "address")}
    is_one = in_parts == {"parts": None, "engine": "local", "address": None}
    if part is not None and not is_one:
        raise UserError("--part packs one part, --parts and --engine all: give one of these")
    reader = reader_class(**options, **dict.fromkeys(generated, ""))
    if is_one:
        summary = pack.pack(reader, part=_part(part or "1/1"), **packed)
    else:
        summary = parts.pack_parts(reader, **in_parts, **packed)
    print(summary)
    return 1 if summary.damaged else 0


def _reader_class(name: str) -> tuple[type, str]:
    if name != PHOTOS:
        return READERS[name]
    from flatdepth.predict.teacher import PhotosReader

    return PhotosReader, PHOTOS_TEXT


def _parser(command: str, description: str) -> Parser:
    return Parser(prog=f"{called('pack')} {command}", description=description)


def _merge(argv: list[str]) -> int:
    parser = _parser("merge", "Join the parts packed with --part i/n.")
    parser.add_argument(
        "parts", nargs="+", type=str, help="Parts, or directories that hold part-i-of-n."
    )
    parser.add_argument("--out", type=str, help="Joined set; by default the directory given.")
    options = parser.parse_args(argv)
    if options.out is None and len(options.parts) > 1:
        raise UserError("several directories to merge need --out")
    summary = parts.merge(options.parts, options.out or options.parts[0])
    print(summary)
    return 1 if summary.damaged else 0


def _verify(argv: list[str]) -> int:
    parser = _parser("verify", "Check every byte of a set; 1 if damaged.")
    parser.add_argument("dir", type=str, help="Directory or URL of the set.")
    parser.add_argument(
        "--workers", type=int, default=cpus(), help="Threads; by default one per CPU."
    )
    options = parser.parse_args(argv)
    found = sets.verify(options.dir, options.workers)
    print(found)
    return 1 if found.damage else 0


def _reindex(argv: list[str]) -> int:
    parser = _parser("reindex", "Give a set of an earlier version the index of this one.")
    parser.add_argument("dir", type=str, help="Directory or URL of the set.")
    print(sets.reindex(parser.parse_args(argv).dir))
    return 0


def _ls(argv: list[str]) -> int:
    parser = _parser("ls", "List the sets at and below a directory.")
    parser.add_argument("dir", type=str, help="Directory or URL.")
    print(sets.ls(parser.parse_args(argv).dir))
    return 0


def _export(argv: list[str]) -> int:
    parser = _parser("export", "Write a set as plain files.")
    parser.add_argument("dir", type=str, help="Directory or URL of the set.")
    parser.add_argument("--out", type=str, required=True, help="An empty or new directory.")
    parser.add_argument(
        "--codes_per_metre",
        type=float,
        default=1000.0,
        help="Depth PNG codes per metre; 1000 is mm and reaches 65.5 m, 256 reaches 256 m.",
    )
    options: Namespace = parser.parse_args(argv)
    print(sets.export(options.dir, options.out, options.codes_per_metre))
    return 0


def _push(argv: list[str]) -> int:
    from flatdepth.data.publish import shard_upload
    from flatdepth.hub import NOT_SENT, send

    parser = _parser("push", "Show what would go to the Hugging Face Hub; with --yes, send it.")
    parser.add_argument("dir", type=str, help="Directory of the set.")
    parser.add_argument("repo", type=str, help="OWNER/NAME; made if there is none.")
    parser.add_argument(
        "--licence", type=str, required=True, help="The Hub's identifier, such as cc-by-4.0."
    )
    parser.add_argument("--private", action="store_true", help="For the owner's eyes only.")
    parser.add_argument("--overwrite", action="store_true", help="Replace files that are there.")
    parser.add_argument("--yes", action="store_true", help="Send it.")
    options = parser.parse_args(argv)
    licence = options.licence.lower()
    upload = shard_upload(options.dir, options.repo, licence=licence, private=options.private)
    print(upload)
    print(send(upload, overwrite=options.overwrite) if options.yes else NOT_SENT)
    return 0


def _bracketed(word: str) -> str:
    """``525,525,319.5,239.5``, also behind ``--intrinsics=``, as the list that it is."""
    return re.sub(r"^(--\w+=)?(-?[\d.]+(?:,-?[\d.]+)+)$", r"\1[\2]", word)


def _part(text: str) -> tuple[int, int]:
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal()):
        raise UserError(f"--part must be i/n, such as 1/4, not {text!r}")
    return int(i), int(n)
