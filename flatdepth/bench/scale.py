"""What 10^8 frames, 1,000 packers and 256 GPUs would need, by simulation with the project's parts.

The order, the dealing out to ranks, the index and the packing of real-sized frames are the real
ones, timed here; nodes, caches and an object store are simulated. docs/scale.md is made of this.
"""

import dataclasses
import math
import tempfile
import time
import tracemalloc
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from flatdepth.augment.plan.coarse import thin_view
from flatdepth.augment.plan.layout import is_pasted, plan_pastes
from flatdepth.augment.rng import Draws
from flatdepth.bench.index import made_up_index, made_up_set
from flatdepth.config import DataConfig, PasteConfig, SetConfig, TrainConfig
from flatdepth.data.frames import Pictures, open_corpus
from flatdepth.data.loader import ANNOUNCED, random_view, training_sample
from flatdepth.data.order import Locality, Order, as_stored, rank_draw
from flatdepth.data.pack import check_frame, pack
from flatdepth.data.readers.rooms import RoomsReader
from flatdepth.data.shards.ahead import neighbours
from flatdepth.data.shards.index import Categories, concatenate
from flatdepth.data.shards.write import encode_sample
from flatdepth.types import Frame

RANKS_PER_NODE = 8
SCENE = 100
"""Samples of a scene, which lie side by side, as in Hypersim."""
EPOCHS = 4
NODE_CACHES = (0.02, 0.04, 0.08)
"""Bytes of a node's cache to those of all sets."""
SMALL_BLOCK = 16
AHEAD = (4, 16, 64)
"""Steps whose samples are asked for ahead; 4 is `data.prefetch` at one micro-batch per step."""
VITL_TFLOP, VITS_TFLOP = 4.003, 0.362
"""Operations of a training step per image of 518 x 518."""
REQUESTS_PER_PREFIX = 5500
"""Reads per second and prefix that S3 promises."""
MEDIAN_S, SPREAD, SLOW_SHARE, SLOW_S = 0.04, 0.5, 0.002, 1.0
"""First bytes, an assumption: log-normal, and of a few reads about a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The training that is imagined.

    Attributes:
        samples, sets: frames, in so many sets of equal size and weight.
        ranks, batch: GPUs, and images of an optimiser step.
        block, window: the order with locality.
        packers: parts that the sets are packed in.
        images_per_s: of ViT-L on one GPU.
        height, width: of a frame, in pixels.
    """

    samples: int
    sets: int
    ranks: int
    batch: int
    block: int
    window: int
    packers: int
    images_per_s: float
    height: int = 768
    width: int = 1024

    @property
    def nodes(self) -> int:
        """Machines, of 8 GPUs each."""
        return max(1, self.ranks // RANKS_PER_NODE)

    def order(self, *, together: bool, samples: int = 0, sets: int = 0, most: int = 10**6) -> Order:
        """The order of all samples, or of fewer, with neighbours together or apart.

        ``most`` bounds samples of a block and blocks of a window.
        """
        sets = sets or self.sets
        block, window = min(self.block, most), min(self.window, most)
        locality = Locality(block=block, window=window) if together else Locality()
        return Order(
            sizes=((samples or self.samples) // sets,) * sets,
            weights=(1.0,) * sets,
            seed=0,
            locality=(locality,) * sets,
        )


def measure_scale(scale: Scale) -> dict[str, Any]:
    """All figures."""
    parts: dict[str, Callable[[Scale], Any]] = {
        "order": order_figures,
        "shuffle": shuffle_figures,
        "reads": read_figures,
        "caches": cache_figures,
        "frames": frame_figures,
        "index": index_figures,
        "listing": listing_figures,
    }
    found: dict[str, Any] = {"scale": dataclasses.asdict(scale)}
    with threadpool_limits(1):  # as in the loader's processes; several threads wait for each other
        for name, measure in tqdm(parts.items(), desc="parts", disable=None, leave=False):
            found[name] = measure(scale)
    found["reads"].append(joined_figures(scale, found["frames"]["bytes"]))
    requests = found["reads"][-1]["requests"]
    found["waits"] = wait_figures(scale, requests)
    found["needs"] = need_figures(scale, found["frames"], requests)
    return found


def order_figures(scale: Scale) -> dict[str, Any]:
    """Microseconds per position, and whether ranks share steps out exactly."""
    found: dict[str, Any] = {"us": {}, "checked": 0, "exact": True}
    for together in (False, True):
        order = scale.order(together=together)
        for looked_up in (256, 16384):
            positions = np.arange(looked_up) + scale.samples
            name = f"{'together' if together else 'apart'}, {looked_up} at once"
            seconds = min(_seconds(lambda: order.draw(positions)) for _ in range(5))  # noqa: B023
            found["us"][name] = seconds / looked_up * 1e6
        steps, share = 2, scale.batch // scale.ranks
        first = scale.samples // scale.batch
        dealt = [
            rank_draw(
                order,
                first,
                steps,
                micro_batch=share,
                rank=rank,
                ranks=scale.ranks,
                accumulation=1,
            )
            for rank in range(scale.ranks)
        ]
        for step in range(steps):
            whole = order.draw(np.arange(scale.batch) + (first + step) * scale.batch)
            mine = slice(step * share, (step + 1) * share)
            columns = [
                np.concatenate([getattr(draw, name)[mine] for draw in dealt])
                for name in ("set", "index", "epoch")
            ]
            expected = np.stack([whole.set, whole.index, whole.epoch])
            found["exact"] &= bool((_sorted(np.stack(columns)) == _sorted(expected)).all())
            found["checked"] += scale.batch
    return found


def shuffle_figures(scale: Scale) -> list[dict[str, Any]]:
    """How often batches hold samples of one scene, and how far apart neighbours are drawn."""
    rng = np.random.default_rng(0)
    small = min(scale.samples, 10**6)
    found = []
    for sets, samples in ((1, small), (scale.sets, scale.samples)):
        for together in (False, True):
            order = scale.order(together=together, samples=samples, sets=sets)
            row: dict[str, Any] = {"sets": sets, "samples": samples, "together": together}
            for batch in (8, 256):
                steps = rng.integers(0, samples // batch, 2 * 10**5 // batch)
                draw = order.draw((steps[:, None] * batch + np.arange(batch)).ravel())
                scenes = (draw.set << 40 | draw.index // SCENE).reshape(-1, batch)
                distinct = 1 + (np.diff(np.sort(scenes, axis=1), axis=1) > 0).sum(axis=1)
                row[f"repeated_{batch}"] = float((distinct < batch).mean())
                row[f"scenes_{batch}"] = float(distinct.mean())
            if sets == 1:
                place = np.empty(samples, np.int64)
                place[order.draw(np.arange(samples)).index] = np.arange(samples)
                apart = np.abs(np.diff(place))
                row["apart"] = [int(np.quantile(apart, q)) for q in (0.05, 0.5, 0.95)]
            found.append(row)
    return found


def read_figures(scale: Scale) -> list[dict[str, Any]]:
    """What nodes read of a stretch of an epoch, without any caches but for what they work on."""
    span = scale.block * scale.window * scale.sets
    steps = max(1, 2 * span // scale.batch)
    order = scale.order(together=True)
    draw = order.draw(np.arange(steps * scale.batch))
    node = np.tile(np.arange(scale.batch) * scale.nodes // scale.batch, steps)
    found = [{"order": "apart", "dealt": "by position", "requests": 1.0, "bytes": 1.0}]
    for dealt in ("by position", "as stored"):
        chosen = as_stored(draw, steps) if dealt == "as stored" else np.arange(len(draw.set))
        block = draw.set[chosen] << 40 | draw.index[chosen] // scale.block
        reads = block * scale.nodes + node
        pairs, first = np.unique(reads, return_index=True)
        last = len(reads) - 1 - np.unique(reads[::-1], return_index=True)[1]
        owner = pairs % scale.nodes
        per_node = np.bincount(owner, minlength=scale.nodes)
        changes = np.zeros((scale.nodes, steps + 1), np.int64)
        np.add.at(changes, (owner, first // scale.batch), 1)
        np.add.at(changes, (owner, last // scale.batch + 1), -1)
        found.append(
            {
                "order": "together",
                "dealt": dealt,
                "requests": len(pairs) / len(block),
                "bytes": len(pairs) * scale.block / len(block),
                "nodes_per_block": len(pairs) / len(np.unique(block)),
                "busiest_node": float(per_node.max() / per_node.mean()),
                "open_blocks": int(np.cumsum(changes, axis=1).max()),
            }
        )
    return found


def joined_figures(scale: Scale, frame_bytes: float) -> dict[str, Any]:
    """What the loader of a rank asks for, which joins neighbours among the samples to come."""
    order, share = scale.order(together=True), scale.batch // scale.ranks
    steps = max(1, ANNOUNCED // share)
    size = int(frame_bytes)
    requests = read = 0
    ranks = range(0, scale.ranks, max(1, scale.ranks // 16))
    for rank in ranks:
        draw = rank_draw(
            order, 0, steps, micro_batch=share, rank=rank, ranks=scale.ranks, accumulation=1
        )
        spans: dict[int, dict[int, tuple[int, int, int]]] = defaultdict(dict)
        for turn, (which, i) in enumerate(zip(draw.set.tolist(), draw.index.tolist(), strict=True)):
            spans[which].setdefault(i, (i * size, (i + 1) * size, turn))
        for of_set in spans.values():
            groups = list(neighbours(of_set))
            requests += len(groups)
            read += sum(1 + max(group) - min(group) for group in groups)
    samples = len(ranks) * steps * share
    return {
        "order": "together",
        "dealt": "as stored, joined by the loader",
        "requests": requests / samples,
        "bytes": read / samples,
    }


def cache_figures(scale: Scale) -> list[dict[str, Any]]:
    """What comes from the store in the last of 4 epochs where each node keeps what it read last.

    Of sets that are smaller than those imagined, with caches, blocks and windows that are smaller
    too, so that what is open at a time is little of a cache here as there.
    """
    sets = min(4, scale.sets)
    samples = min(scale.samples, 2**18) // (sets * scale.batch) * sets * scale.batch
    steps, found = samples // scale.batch, []
    for nodes in sorted({1, scale.nodes}):
        ways = [(False, "by position", 1), (False, "as stored", 1)]
        ways += [(True, "as stored", 1), (True, "as stored", min(scale.block, SMALL_BLOCK))]
        for together, dealt, unit in ways if nodes > 1 else ways[::3]:
            order = scale.order(together=together, samples=samples, sets=sets, most=SMALL_BLOCK)
            row: dict[str, Any] = {"nodes": nodes, "together": together, "dealt": dealt}
            row["read"] = "samples" if unit == 1 else "blocks"
            watched = sorted({0, nodes // 3, nodes - 1})
            reads: list[list[list[int]]] = []
            for epoch in range(EPOCHS):
                draw = order.draw(np.arange(samples) + epoch * samples)
                chosen = as_stored(draw, steps) if dealt == "as stored" else np.arange(samples)
                asked = (draw.set << 40 | draw.index // unit)[chosen].reshape(steps, nodes, -1)
                reads.append([asked[:, node].ravel().tolist() for node in watched])
            for share in NODE_CACHES:
                missed = [
                    _missed([epoch[node] for epoch in reads], int(share * samples / unit))
                    for node in range(len(watched))
                ]
                row[str(share)] = sum(missed) * unit / sum(len(one) for one in reads[-1])
            found.append(row)
    return found


def _missed(epochs: Sequence[Sequence[int]], room: int) -> int:
    """Reads of the last epoch that an LRU cache of so many things did not have."""
    kept: OrderedDict[int, None] = OrderedDict()
    missed = 0
    for epoch in epochs:
        missed = 0
        for thing in epoch:
            if thing in kept:
                kept.move_to_end(thing)
                continue
            missed += 1
            kept[thing] = None
            if len(kept) > room:
                kept.popitem(last=False)
    return missed


def frame_figures(scale: Scale) -> dict[str, float]:
    """CPU milliseconds and bytes of a frame: checked and encoded, read and decoded, planned."""
    reader = RoomsReader(scenes=2, frames_per_scene=2, height=scale.height, width=scale.width)
    raws = [reader.read(item) for item in reader.list().items]

    def encode() -> None:
        for raw in raws:
            check_frame(raw, reader)
            encode_sample(raw)

    encode_s = _seconds(encode)
    with tempfile.TemporaryDirectory() as folder:
        pack(reader, folder, workers=1)
        config = TrainConfig(data=DataConfig(train=[SetConfig(path=folder)], val_share=0.5))
        corpus = open_corpus(config.data)
        (subset,) = corpus.train
        frame_bytes = np.diff([subset.shards.index.span(row) for row in range(len(raws))]).mean()
        places = range(len(subset))
        decode_s = min(
            _seconds(lambda: [subset.frame(place) for place in places]) for _ in range(3)
        )
        sample_s = _seconds(
            lambda: [
                training_sample(corpus, config, subset, place, epoch, 0)
                for epoch in range(8)
                for place in places
            ]
        )
        frames = [subset.frame(place) for place in places]
        planned = [
            _planning_seconds(corpus.pictures, config, frame, Draws(0, epoch, place))
            for epoch in range(8)
            for place, frame in enumerate(frames)
        ]
    return {
        "bytes": float(frame_bytes),
        "encode_ms": 1e3 * encode_s / len(raws),
        "decode_ms": 1e3 * decode_s / len(places),
        "sample_ms": 1e3 * sample_s / len(places) / 8,
        "plan_ms": 1e3 * float(np.mean(planned)),
        "shown": _shown(config.paste),
    }


def _planning_seconds(pictures: Pictures, config: TrainConfig, frame: Frame, draws: Draws) -> float:
    """CPU seconds of what one thread of a process does at a time for a sample."""
    if not is_pasted(draws, config.paste):
        return 0.0
    thin = thin_view(frame, random_view(frame.depth_m.shape, config.data, draws))
    return _seconds(
        lambda: plan_pastes(
            thin, draws, config.paste, picture_aspects=pictures.aspects, depth_range_m=(0.1, 20.0)
        )
    )


def _shown(paste: PasteConfig) -> float:
    """Other frames that the pastes of a sample show, on average and if all find a place."""
    content = dataclasses.asdict(paste.content)
    others = content["mural"] + content["screen"] + content["opening"]
    return float(paste.share * (1 + paste.max_pastes) / 2 * others / sum(content.values()))


def listing_figures(scale: Scale) -> dict[str, float]:
    """What a packer of a few frames takes, per frame that its reader lists."""
    items = min(scale.samples, 10**5) // SCENE * SCENE
    reader = RoomsReader(scenes=items // SCENE, frames_per_scene=SCENE, height=64, width=64)

    def pack_few() -> None:
        with tempfile.TemporaryDirectory() as folder:
            pack(reader, folder, workers=1, part=(1, min(items, 9999)))

    seconds = _seconds(pack_few)
    tracemalloc.start()
    try:
        pack_few()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return {"items": items, "item_us": 1e6 * seconds / items, "item_bytes": peak / items}


def index_figures(scale: Scale) -> dict[str, Any]:
    """Joining the indices of parts, and opening what comes of it."""
    rows = max(10, min(1000, scale.samples // scale.packers))
    merges = []
    for parts, each in (
        (scale.packers // 10, rows),
        (scale.packers, rows),
        (scale.packers // 10, 100 * rows),
    ):
        one = made_up_index(each)
        indices = [
            dataclasses.replace(
                one,
                scenes=Categories(one.scenes.codes, [f"{p}/{name}" for name in one.scenes.names]),
            )
            for p in range(parts)
        ]
        whole, join_s = _timed(lambda: concatenate(indices, {}))  # noqa: B023
        (head, columns), write_s = _timed(whole.to_bytes)
        merges.append({"parts": parts, "rows": each, "join_s": join_s, "write_s": write_s})
    opened = []
    for samples in (parts * rows, 10 * parts * rows):
        with made_up_set(samples, "columns") as folder:
            data = DataConfig(train=[SetConfig(path=str(folder))])
            open_s = min(_seconds(lambda: open_corpus(data)) for _ in range(3))  # noqa: B023
            corpus = open_corpus(data)
            held = sum(subset.rows.nbytes for subset in (*corpus.train, *corpus.val))
        opened.append({"samples": samples, "open_s": open_s, "held_bytes": held})
    fewer, many, longer = merges
    n = scale.samples
    by_parts = _exponent(fewer, many, "parts", "join_s", "write_s")
    by_rows = _exponent(fewer, longer, "rows", "join_s", "write_s")
    opening = _exponent(opened[0], opened[1], "samples", "open_s")
    return {
        "merges": merges,
        "opened": opened,
        "by_parts": by_parts,
        "by_rows": by_rows,
        "by_samples": opening,
        "row_bytes": len(columns) / (parts * each),
        "head_bytes_per_shard": len(head) / len(whole.shards),
        "merge_s": (longer["join_s"] + longer["write_s"]) * (n / (parts * each)) ** by_rows,
        "merge_bytes": 3 * n * len(columns) / (parts * each),
        "open_s": opened[1]["open_s"] * (n / opened[1]["samples"]) ** opening,
        "held_bytes_per_rank": opened[1]["held_bytes"] * n / opened[1]["samples"],
    }


def _exponent(small: Mapping[str, Any], large: Mapping[str, Any], of: str, *times: str) -> float:
    """By which power of ``of`` the time grows from one measurement to the other."""
    seconds = [sum(each[name] for name in times) for each in (small, large)]
    return math.log(seconds[1] / seconds[0]) / math.log(large[of] / small[of])


def wait_figures(scale: Scale, requests: float) -> list[dict[str, Any]]:
    """Share of its full speed that a training has where each step waits for its slowest read.

    Args:
        requests: per sample where neighbours stay together.
    """
    rng = np.random.default_rng(0)
    step_s = scale.batch / (scale.images_per_s * scale.ranks)
    steps, found = 500, []
    hedge_s = float(np.quantile(_first_bytes(rng, 10**5), 0.95))
    for name, reads in (("apart", scale.batch), ("together", math.ceil(scale.batch * requests))):
        for hedged in (False, True):
            seconds = _first_bytes(rng, steps * reads)
            if hedged:
                seconds = np.minimum(seconds, hedge_s + _first_bytes(rng, steps * reads))
            slowest = seconds.reshape(steps, reads).max(axis=1)
            row: dict[str, Any] = {
                "order": name,
                "reads": reads,
                "hedged": hedged,
                "ms": [1e3 * float(np.quantile(seconds, q)) for q in (0.5, 0.99, 0.999)],
                "slowest_ms": 1e3 * float(np.median(slowest)),
            }
            for ahead in AHEAD:
                done = np.zeros(steps + 1)
                for step in range(steps):
                    asked = done[max(0, step - ahead + 1)]
                    done[step + 1] = max(done[step], asked + slowest[step]) + step_s
                row[f"speed_{ahead}"] = steps * step_s / float(done[-1])
            found.append(row)
    return found


def _first_bytes(rng: np.random.Generator, n: int) -> np.ndarray:
    """Seconds until the first bytes of reads come."""
    slow = rng.random(n) < SLOW_SHARE
    seconds: np.ndarray = np.where(slow, SLOW_S, MEDIAN_S) * np.exp(SPREAD * rng.normal(size=n))
    return seconds


def need_figures(scale: Scale, frames: Mapping[str, float], requests: float) -> dict[str, Any]:
    """Arithmetic: bytes, requests and cores that follow from the other figures."""
    total_bytes = scale.samples * frames["bytes"]
    rows = []
    for model, tflop in (("ViT-L", VITL_TFLOP), ("ViT-S", VITS_TFLOP)):
        per_gpu = scale.images_per_s * VITL_TFLOP / tflop
        images = per_gpu * scale.ranks
        read = images * (1 + frames["shown"])
        rows.append(
            {
                "model": model,
                "images_per_gpu": per_gpu,
                "epoch_s": scale.samples / images,
                "node_bytes": read * frames["bytes"] / scale.nodes,
                "all_bytes": read * frames["bytes"],
                "requests_apart": read,
                "requests_together": images * (requests + frames["shown"]),
                "cores_per_gpu": per_gpu * frames["sample_ms"] / 1e3,
                "planned_per_process": 1e3 / frames["plan_ms"],
            }
        )
    return {
        "total_bytes": total_bytes,
        "pack_core_hours": scale.samples * frames["encode_ms"] / 3.6e6,
        "pack_hours": scale.samples * frames["encode_ms"] / 3.6e6 / scale.packers,
        "rows": rows,
    }


def _seconds(work: Callable[[], object]) -> float:
    return _timed(work)[1]


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What work gives, and the seconds of processor time that it took."""
    begin = time.process_time()
    return work(), time.process_time() - begin


def _sorted(columns: np.ndarray) -> np.ndarray:
    return columns[:, np.lexsort(columns)]
