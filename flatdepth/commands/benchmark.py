"""Measure how much memory and time flatdepth takes, and against simpler ways of doing the same.

flatdepth benchmark paste [--batch 4] [--size 518] [--rounds 20]      the paste stage
flatdepth benchmark memory [--fit 8GiB] [--cap 8GiB] [--config FILE]  memory of a training
flatdepth benchmark step [--steps 10] [--config FILE]                 stages of its steps
flatdepth benchmark loader [--samples 128] [--config FILE]            reading and decoding
flatdepth benchmark decode [PICTURE ...] [--threads 1 2 4]            JPEG decoders
flatdepth benchmark index [--samples 1000000]                         opening a large set
flatdepth benchmark scale [--samples 100000000] [--ranks 256]         a training of that size
flatdepth benchmark remote [--samples 512] [--block 16]               reading from a slow server
flatdepth benchmark pack [--frames 64] [--parts 4] [--rounds 3]       packing on engines
flatdepth benchmark gpu [--minutes 8] [--dry] [--wheels DIR]          all that needs a GPU

memory, step and loader take every option of training too, and the quickstart's without any.
--out FILE.json writes the figures; gpu, which docs/gpu.md explains, always writes them.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from flatdepth.bench.timing import as_json, compare, environment, table
from flatdepth.cli import Parser, as_called, called, number, parse_config
from flatdepth.config import MOST_SIDE, TrainConfig
from flatdepth.errors import UserError, import_extra
from flatdepth.models.precision import best_device
from flatdepth.resources import QUICKSTART, ROOT


def main(argv: list[str]) -> int:
    """Parse the command line and run one benchmark."""
    chosen, others = options().parse_known_args(argv)
    alone = {
        "paste": run_paste,
        "index": run_index,
        "decode": run_decode,
        "remote": run_remote,
        "scale": run_scale,
        "pack": run_pack,
    }
    if chosen.command in (*alone, "gpu") and others:
        own = f"{called('benchmark')} {chosen.command}"
        raise UserError(f"unknown option {others[0]}; see {own} --help")
    if chosen.command == "gpu":
        return run_gpu(chosen)
    if chosen.command in alone:
        figures = alone[chosen.command](chosen)
    else:
        arguments = others or [f"--config={QUICKSTART}"]
        config = parse_config(TrainConfig, arguments, prog=called("benchmark"), description=None)
        run = {"memory": run_memory, "step": run_step, "loader": run_loader}[chosen.command]
        figures = run(chosen, config)
    if chosen.out:
        chosen.out.write_text(json.dumps(figures, indent=1))
    return 0


def options() -> Parser:
    """The options of each benchmark."""
    parser = Parser(prog=called("benchmark"), description=as_called("benchmark", __doc__))
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    names = {
        "paste": "the paste stage, one layer of art per image",
        "memory": "GPU memory of a training, measured on CUDA, else simulated",
        "step": "stages of an optimiser step",
        "loader": "the loader against decoding alone and against WebDataset + DataLoader",
        "decode": "JPEG decoders: their time and whether their pixels are Pillow's",
        "index": "opening a made-up set: its index and the corpus of a training (Linux)",
        "scale": "order, reads, caches, index and packing of a training on so many frames and GPUs",
        "remote": "reading a made-up set over a line with a long tail: hedged, ahead, kept",
        "pack": "packing frames of 1024 x 768 by one process, by a pool, and by Ray",
        "gpu": "everything that needs a GPU, the most important first, each in its own process",
    }
    subs = {
        name: commands.add_parser(name, help=text, description=text) for name, text in names.items()
    }
    for sub in subs.values():
        sub.add_argument("--out", type=Path, help="write the figures as JSON")
    subs["gpu"].set_defaults(out=Path("gpu.json"))
    subs["paste"].add_argument("--batch", type=number(1, 1024), default=4, help="images per batch")
    subs["paste"].add_argument(
        "--size", type=number(1, MOST_SIDE), default=518, help="height and width in pixels"
    )
    subs["paste"].add_argument(
        "--area",
        type=number(1e-4, 1.0),
        nargs=2,
        default=(0.03, 0.3),
        metavar=("LOW", "HIGH"),
        help="range of a paste's area as a share of the image",
    )
    subs["paste"].add_argument("--rounds", type=number(1, 10**5), default=20, help="timed rounds")
    subs["memory"].add_argument(
        "--cap", metavar="SIZE", help="on CUDA: limit the allocator to this much, such as 8GiB"
    )
    subs["memory"].add_argument(
        "--fit", metavar="SIZE", help="propose micro_batch and checkpointing for a GPU of this size"
    )
    subs["step"].add_argument(
        "--steps", type=number(1, 10**5), default=10, help="timed optimiser steps"
    )
    subs["step"].add_argument(
        "--peak_tflops", type=number(1e-3, 1e6), help="peak of the GPU; known ones are looked up"
    )
    subs["loader"].add_argument(
        "--samples",
        type=number(1, 10**5),
        default=128,
        help="timed samples per contender and round",
    )
    subs["loader"].add_argument("--rounds", type=number(1, 10**5), default=6, help="rounds")
    subs["loader"].add_argument(
        "--pace",
        type=number(1e-3, 1e6),
        default=4.0,
        help="images/s of the training whose waiting is measured (about ViT-L on a laptop's GPU)",
    )
    subs["decode"].add_argument(
        "pictures",
        type=Path,
        nargs="*",
        metavar="PICTURE",
        help="JPEG files or folders of them (default: some of the demo sets)",
    )
    subs["decode"].add_argument(
        "--threads", type=number(1, 256), nargs="+", default=(1, 2, 4), help="numbers of threads"
    )
    subs["decode"].add_argument("--rounds", type=number(1, 10**5), default=20, help="rounds")
    subs["index"].add_argument(
        "--samples", type=number(10, 10**8), default=10**6, help="of the set (default: 10^6)"
    )
    for name, low, high, default, text in (
        ("samples", 1000, 10**9, 10**8, "frames of all sets"),
        ("sets", 1, 1000, 50, "shard sets, of one size and weight"),
        ("ranks", 8, 4096, 256, "GPUs, 8 to a machine"),
        ("batch", 8, 10**5, 2048, "images of an optimiser step"),
        ("block", 2, 10**4, 64, "data.train.shuffle_block"),
        ("window", 1, 10**4, 64, "data.train.shuffle_window"),
        ("packers", 10, 10**4, 1000, "parts that are packed at a time"),
        ("images_per_s", 1, 10**5, 200, "of ViT-L on one GPU"),
    ):
        subs["scale"].add_argument(
            f"--{name}",
            type=number(low, high),
            default=default,
            help=f"{text} (default: {default})",
        )
    remote = subs["remote"]
    remote.add_argument("--samples", type=number(1, 10**4), default=512, help="per round")
    remote.add_argument("--rounds", type=number(1, 10**5), default=5, help="timed rounds")
    remote.add_argument("--threads", type=number(1, 256), default=4, help="threads that read")
    remote.add_argument(
        "--block",
        type=number(1, 10**5),
        default=16,
        help="neighbours read near each other; 1: none",
    )
    remote.add_argument(
        "--median_ms", type=number(0.0, 1e4), default=30.0, help="median time to the first byte"
    )
    remote.add_argument(
        "--slow_share", type=number(0.0, 1.0), default=0.01, help="share of slow answers"
    )
    remote.add_argument(
        "--slow_ms", type=number(0.0, 1e5), default=2000.0, help="time to their first byte"
    )
    remote.add_argument("--mb_per_s", type=number(0.1, 1e5), default=50.0, help="of each answer")
    subs["pack"].add_argument("--frames", type=number(1, 10**6), default=64, help="in all")
    subs["pack"].add_argument("--parts", type=number(1, 9999), default=4, help="of the frames")
    subs["pack"].add_argument("--rounds", type=number(1, 10**5), default=3, help="timed rounds")
    gpu = subs["gpu"]
    gpu.add_argument(
        "--minutes", type=number(1, 10**4), default=8, help="time for all parts together"
    )
    gpu.add_argument("--dry", action="store_true", help="the same list at tiny sizes on the CPU")
    gpu.add_argument(
        "--shards",
        type=Path,
        default=Path("shards"),
        help="directory of demo_pictures, which is packed if it is missing",
    )
    gpu.add_argument(
        "--wheels",
        type=Path,
        metavar="DIR",
        help="instead: download what a machine without network lacks (docs/gpu.md)",
    )
    return parser


def run_gpu(chosen: argparse.Namespace) -> int:
    """Everything that needs a GPU; 1 if a part failed."""
    if chosen.wheels is not None:
        from flatdepth.bench.gpu.wheels import download

        pyproject = ROOT / "pyproject.toml"
        if not pyproject.is_file():
            raise UserError("--wheels needs a clone of flatdepth; run it from pip install -e .")
        print(download(pyproject, chosen.wheels), end="")
        return 0
    from flatdepth.bench.gpu.plan import PARTS
    from flatdepth.bench.gpu.rows import table
    from flatdepth.bench.gpu.runner import run_parts
    from flatdepth.bench.gpu.settings import Settings
    from flatdepth.data.demo import DEMO_SETS, ensure_demo

    if not chosen.dry and not torch.cuda.is_available():
        raise UserError("gpu needs a CUDA GPU; --dry runs the same list at tiny sizes on a CPU")
    if chosen.out.exists():
        raise UserError(f"{chosen.out} exists; move it away, or name another file with --out")
    for name in DEMO_SETS:
        ensure_demo(str(chosen.shards / name))
    work = Path(tempfile.mkdtemp(prefix="flatdepth-gpu-"))
    settings = Settings(
        shards=chosen.shards.resolve(),
        work=work,
        dry=chosen.dry,
    )
    print(f"{chosen.minutes} minutes at most; results in {chosen.out}, logs in {work}", flush=True)
    rows = run_parts(PARTS, settings, seconds=60.0 * chosen.minutes, out=chosen.out)
    print(table(rows))
    return int(any(row.status == "failed" for row in rows))


def run_paste(chosen: argparse.Namespace) -> dict[str, object]:
    """The paste stage and its yardsticks."""
    import_extra("cv2", "benchmark paste", "benchmark")
    from flatdepth.bench.paste import paste_contenders

    device = best_device()
    timings = compare(
        paste_contenders(chosen.batch, chosen.size, tuple(chosen.area), device),
        baseline="grid_sample",
        rounds=chosen.rounds,
        device=device,
    )
    facts = environment(device)
    print(f"{chosen.batch} x 3 x {chosen.size} x {chosen.size}, {facts['device']}, one layer")
    print(table(timings))
    return {"environment": facts, "timings": as_json(timings)}


def run_memory(chosen: argparse.Namespace, config: TrainConfig) -> dict[str, object]:
    """Memory of the configuration, and what would fit."""
    from flatdepth.training import memory

    figures: dict[str, object] = {}
    if torch.cuda.is_available():
        measured = memory.measure(
            config, None if chosen.cap is None else memory.parse_bytes(chosen.cap)
        )
        print(memory.measurement_text(config, measured))
        figures["measured"] = asdict(measured)
    elif chosen.cap is not None:
        raise UserError("--cap needs a CUDA GPU; without one, use --fit")
    simulated = memory.simulate(config)
    print(memory.simulation_text(config, simulated))
    figures["simulated"] = asdict(simulated)
    if chosen.fit is not None:
        budget = memory.parse_bytes(chosen.fit)
        proposals = memory.fit(config, budget)
        print(memory.fit_text(config, proposals, budget))
        figures["fit"] = [asdict(proposal) for proposal in proposals]
    return figures


def run_step(chosen: argparse.Namespace, config: TrainConfig) -> dict[str, object]:
    """Stages of an optimiser step."""
    from flatdepth.bench.step import measure_steps, step_text

    device = best_device()
    times = measure_steps(config, steps=chosen.steps, device=device, peak_tflops=chosen.peak_tflops)
    print(step_text(config, times))
    return asdict(times)


def run_loader(chosen: argparse.Namespace, config: TrainConfig) -> dict[str, object]:
    """The loader and its yardsticks."""
    from flatdepth.bench.loader import loader_text, measure_loader

    found = measure_loader(config, samples=chosen.samples, rounds=chosen.rounds, pace=chosen.pace)
    print(loader_text(config, found))
    return asdict(found)


def run_decode(chosen: argparse.Namespace) -> dict[str, object]:
    """Decoders side by side."""
    from flatdepth.bench.decode import decoding_text, measure_decoding, pictures

    payloads = pictures(chosen.pictures)
    found = measure_decoding(payloads, threads=chosen.threads, rounds=chosen.rounds)
    print(decoding_text(payloads, found))
    facts = environment(torch.device("cpu"))
    return {"environment": facts, "decodings": [asdict(one) for one in found]}


def run_pack(chosen: argparse.Namespace) -> dict[str, object]:
    """Packing on engines."""
    import_extra("ray", "benchmark pack", "ray")
    from flatdepth.bench.packing import measure_packing, packing_text

    timings, ray_s, size = measure_packing(chosen.frames, chosen.parts, chosen.rounds)
    print(table(timings))
    print(packing_text(timings, chosen.frames, chosen.parts, ray_s, size))
    return {"packing": as_json(timings), "ray_s": ray_s, "bytes": size}


def run_index(chosen: argparse.Namespace) -> dict[str, object]:
    """Opening a large set."""
    from flatdepth.bench.index import measure_openings, openings_text

    found = measure_openings(chosen.samples)
    print(openings_text(found))
    return {"openings": [asdict(one) for one in found]}


def run_scale(chosen: argparse.Namespace) -> dict[str, object]:
    """What a training of that size needs."""
    from flatdepth.bench.scale import Scale, measure_scale
    from flatdepth.bench.scale_tables import tables

    names = ("samples", "sets", "ranks", "batch", "block", "window", "packers", "images_per_s")
    found = measure_scale(Scale(**{name: getattr(chosen, name) for name in names}))
    for title, text in tables(found).items():
        print(f"{title}\n\n{text}")
    return found


def run_remote(chosen: argparse.Namespace) -> dict[str, object]:
    """Reading from a slow server."""
    from flatdepth.bench.remote import measure_remote, remote_text

    found = measure_remote(
        samples=chosen.samples,
        rounds=chosen.rounds,
        threads=chosen.threads,
        block=chosen.block,
        line={
            "median_s": chosen.median_ms / 1e3,
            "slow_share": chosen.slow_share,
            "slow_s": chosen.slow_ms / 1e3,
            "bytes_per_s": chosen.mb_per_s * 1e6,
        },
    )
    print(
        f"{chosen.samples} samples of 100 KB, {chosen.threads} threads, blocks of {chosen.block}; "
        f"first bytes after {chosen.median_ms:g} ms, {chosen.slow_share:.1%} after "
        f"{chosen.slow_ms:g} ms"
    )
    print(remote_text(found))
    return asdict(found)
