"""The figures of ``bench.scale`` as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from flatdepth.bench.scale import AHEAD, NODE_CACHES, RANKS_PER_NODE


def tables(found: Mapping[str, Any]) -> dict[str, str]:
    """The figures as Markdown, by part."""
    scale, order, frames, index = (found[name] for name in ("scale", "order", "frames", "index"))
    needs, listing = found["needs"], found["listing"]
    nodes = max(1, scale["ranks"] // RANKS_PER_NODE)
    words = {False: "apart", True: "together"}
    return {
        "order": _table(
            ("looked up", "µs of a core per position"),
            [(name, f"{us:.2g}") for name, us in order["us"].items()],
        ),
        "shuffle": _table(
            (
                *("sets", "samples", "neighbours", "batches of 8 with two of a scene"),
                *("scenes in 256", "between neighbours (5, 50, 95 %)"),
            ),
            [
                (
                    str(row["sets"]),
                    f"{row['samples']:,}",
                    words[row["together"]],
                    f"{row['repeated_8']:.2%}",
                    f"{row['scenes_256']:.0f}",
                    " / ".join(f"{n:,}" for n in row.get("apart", ())),
                )
                for row in found["shuffle"]
            ],
        ),
        "reads": _table(
            (
                *("neighbours", "dealt out", "requests per sample", "bytes read per byte used"),
                *("nodes per block", "busiest node", "open on a node"),
            ),
            [
                (
                    row["order"],
                    row["dealt"],
                    f"{row['requests']:.3f}",
                    f"{row['bytes']:.2g}",
                    f"{row['nodes_per_block']:.1f}" if "open_blocks" in row else "",
                    f"{row['busiest_node']:.2f} x mean" if "open_blocks" in row else "",
                    f"{row['open_blocks'] * scale['block'] * frames['bytes'] / 1e9:.1f} GB"
                    if "open_blocks" in row
                    else "",
                )
                for row in found["reads"]
            ],
        ),
        "caches": _table(
            (
                "nodes",
                "neighbours",
                "dealt out",
                "read",
                *(f"cache of {s:.0%}" for s in NODE_CACHES),
            ),
            [
                (
                    str(row["nodes"]),
                    words[row["together"]],
                    row["dealt"],
                    row["read"],
                    *(f"{row[str(s)]:.3f}" for s in NODE_CACHES),
                )
                for row in found["caches"]
            ],
        ),
        "waits": _table(
            (
                *("neighbours", "reads of a step", "hedged", "one read (50, 99, 99.9 %)"),
                *("slowest of a step", *(f"{n} steps ahead" for n in AHEAD)),
            ),
            [
                (
                    row["order"],
                    f"{row['reads']:,}",
                    "yes" if row["hedged"] else "no",
                    " / ".join(f"{ms:.0f}" for ms in row["ms"]) + " ms",
                    f"{row['slowest_ms']:.0f} ms",
                    *(f"{row[f'speed_{n}']:.0%}" for n in AHEAD),
                )
                for row in found["waits"]
            ],
        ),
        "index": _table(
            ("parts", "rows of each", "join", "bytes of it"),
            [
                (
                    f"{row['parts']:,}",
                    f"{row['rows']:,}",
                    f"{row['join_s']:.3f} s",
                    f"{row['write_s']:.3f} s",
                )
                for row in index["merges"]
            ],
        ),
        "needs": _table(
            (
                *("model", "images/s per GPU", "epoch", "bytes/s of a node", "of all"),
                *("requests/s, apart", "together", "cores per GPU"),
            ),
            [
                (
                    row["model"],
                    f"{row['images_per_gpu']:,.0f}",
                    f"{row['epoch_s'] / 60:.1f} min",
                    f"{row['node_bytes'] / 1e9:.2g} GB",
                    f"{row['all_bytes'] / 1e9:,.0f} GB",
                    f"{row['requests_apart']:,.0f}",
                    f"{row['requests_together']:,.0f}",
                    f"{row['cores_per_gpu']:.1f}",
                )
                for row in needs["rows"]
            ],
        ),
        "sums": _table(
            ("what", "figure"),
            [
                (
                    f"positions checked, shared out exactly among {scale['ranks']} ranks",
                    f"{order['checked']:,}: {'yes' if order['exact'] else 'NO'}",
                ),
                (
                    f"a frame of {scale['height']} x {scale['width']}; all; a node's share",
                    f"{frames['bytes'] / 1e3:.0f} kB; {needs['total_bytes'] / 1e12:.3g} TB; "
                    f"{needs['total_bytes'] / nodes / 1e12:.2g} TB",
                ),
                (
                    "checking and encoding a frame",
                    f"{frames['encode_ms']:.0f} ms of a core",
                ),
                (
                    f"that for all, and with {scale['packers']:,} packers of a core each",
                    f"{needs['pack_core_hours']:,.0f} core hours; {needs['pack_hours']:.2g} h",
                ),
                (
                    "what every packer does first, per frame of the whole layout",
                    f"{listing['item_us']:.0f} µs, {listing['item_bytes']:,.0f} bytes at the most",
                ),
                (
                    "that for all in one layout",
                    f"{listing['item_us'] * scale['samples'] / 6e7:.0f} min, "
                    f"{listing['item_bytes'] * scale['samples'] / 1e9:.0f} GB in each packer",
                ),
                ("reading and decoding a frame", f"{frames['decode_ms']:.1f} ms of a core"),
                (
                    "a training sample, its pastes and the frames that they show included",
                    f"{frames['sample_ms']:.0f} ms of a core",
                ),
                (
                    "of which planning, in threads one sample at a time",
                    f"{frames['plan_ms']:.1f} ms, so at most "
                    f"{needs['rows'][0]['planned_per_process']:,.0f} images/s",
                ),
                ("other frames that the pastes of a sample show", f"{frames['shown']:.2f}"),
                (
                    "index",
                    f"{index['row_bytes']:.0f} bytes per row, "
                    f"{index['row_bytes'] * scale['samples'] / 1e9:.3g} GB",
                ),
                (
                    "joining parts grows as",
                    f"parts^{index['by_parts']:.2f} and rows^{index['by_rows']:.2f}",
                ),
                (
                    "joining all as one set",
                    f"{index['merge_s']:.0f} s, {index['merge_bytes'] / 1e9:.0f} GB of memory",
                ),
                ("opening all as one set, with its split", f"{index['open_s']:.1f} s"),
                (
                    "numbers of its rows that a rank keeps; a node",
                    f"{index['held_bytes_per_rank'] / 1e6:,.0f} MB; "
                    f"{index['held_bytes_per_rank'] * RANKS_PER_NODE / 1e9:.2g} GB",
                ),
            ],
        ),
    }


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
