"""What a large training needs: the simulation at a small size, and the page that it is made of."""

import json

import numpy as np
import pytest

from flatdepth.bench import scale as bench
from flatdepth.bench.scale import Scale, measure_scale
from flatdepth.bench.scale_tables import tables
from flatdepth.commands import benchmark
from flatdepth.errors import UserError
from tests.conftest import REPOSITORY

SMALL = Scale(
    samples=19_200,
    sets=3,
    ranks=16,
    batch=64,
    block=8,
    window=8,
    packers=20,
    images_per_s=200.0,
    height=84,
    width=112,
)


def test_the_tables_of_the_docs_are_those_of_its_figures() -> None:
    found = json.loads((REPOSITORY / "docs" / "results" / "scale.json").read_text("utf-8"))
    page = (REPOSITORY / "docs" / "scale.md").read_text("utf-8")
    for name, table in tables(found).items():
        assert table in page, name
    assert found["scale"]["samples"] == 10**8 and found["scale"]["ranks"] == 256
    need = found["needs"]["rows"][0]
    for figure in (
        f"| {need['planned_per_process']:.0f} at most | {need['planned_per_process'] / 200:.1f} |",
        f"| {need['requests_apart']:,.0f}/s |",
        f"`shuffle_block`: {need['requests_together']:,.0f}/s only",
        f"{found['listing']['item_bytes'] / 10:.0f} GB and ",
        f"{found['index']['merge_s']:.0f} s and {found['index']['merge_bytes'] / 1e9:.0f} GB",
        f"{found['waits'][0]['speed_4']:.0%} with `data.prefetch: 4`",
        f"hedged and 64 ahead {found['waits'][1]['speed_64']:.0%}",
    ):
        assert figure in page, figure


def test_it_runs_at_a_small_size() -> None:
    found = measure_scale(SMALL)
    assert json.loads(json.dumps(found)) == found
    assert all(text.count("\n") > 2 for text in tables(found).values())
    assert found["order"]["exact"] and found["order"]["checked"] == 4 * SMALL.batch
    apart, by_position, stored, joined = found["reads"]
    assert stored["requests"] < by_position["requests"] < apart["requests"] == 1
    assert 1 <= stored["nodes_per_block"] < by_position["nodes_per_block"] <= SMALL.nodes
    assert stored["bytes"] == pytest.approx(8 * stored["requests"])
    assert 0 < joined["requests"] < 1 <= joined["bytes"]
    fewer, many, longer = found["index"]["merges"]
    assert (many["parts"], longer["rows"]) == (10 * fewer["parts"], 100 * fewer["rows"])
    hedged = {row["order"]: row for row in found["waits"] if row["hedged"]}
    plain = {row["order"]: row for row in found["waits"] if not row["hedged"]}
    assert hedged["apart"]["slowest_ms"] < plain["apart"]["slowest_ms"]
    for row in hedged.values():
        assert row["speed_4"] <= row["speed_16"] <= row["speed_64"] <= 1


def test_a_cache_of_a_permuted_set_on_one_node_follows_its_law() -> None:
    """Between two reads of a sample at u and v lie 1 - u (1 - v) of the set."""
    order = SMALL.order(together=False, samples=20_000, sets=1)
    epochs = [order.draw(np.arange(20_000) + 20_000 * e).index.tolist() for e in range(3)]
    for cache in (0.1, 0.5, 0.8):
        hits = 1 - bench._missed(epochs, int(20_000 * cache)) / 20_000
        a = 1 - cache
        assert hits == pytest.approx(1 - a + a * np.log(a), abs=0.01)
    assert bench._missed(epochs, 20_000) == 0


def test_a_step_of_reads_is_as_fast_as_the_slowest_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of one length: so many steps ahead, a wait is hidden or paid once per so many."""
    step_s = SMALL.batch / (SMALL.images_per_s * SMALL.ranks)
    monkeypatch.setattr(bench, "_first_bytes", lambda *given: np.full(given[1], 8 * step_s))
    row = bench.wait_figures(SMALL, 1.0)[0]
    assert row["speed_4"] == pytest.approx(4 / 9, rel=0.02)
    assert row["speed_16"] == pytest.approx(500 / 508)


def test_batches_repeat_scenes_as_often_as_chance_says() -> None:
    alone = bench.shuffle_figures(SMALL)[0]
    scenes = SMALL.samples / bench.SCENE
    some = 1 - np.prod(1 - np.arange(8) * (bench.SCENE - 1) / (SMALL.samples - np.arange(8)))
    assert alone["repeated_8"] == pytest.approx(some, rel=0.1)
    assert alone["scenes_256"] == pytest.approx(scenes * (1 - (1 - 1 / scenes) ** 256), rel=0.02)


def test_it_takes_no_option_of_a_training() -> None:
    with pytest.raises(UserError, match=r"unknown option --steps; see .* scale --help"):
        benchmark.main(["scale", "--steps", "3"])
