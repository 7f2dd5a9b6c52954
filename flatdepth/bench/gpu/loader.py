"""How many samples per second the loader makes, against what the networks consume."""

import dataclasses
from collections.abc import Iterator

from flatdepth.bench.gpu.rows import Row, at_least, figure
from flatdepth.bench.gpu.settings import Settings
from flatdepth.bench.loader import loader_rate
from flatdepth.data.frames import open_corpus

CONSUMED = "images/s without waiting"


def loader(settings: Settings) -> Iterator[Row]:
    """Samples for 518 x 518 on all cores, without and with pastes."""
    config = settings.config("vits_indoor", batch=16, micro_batch=16)
    samples = 32 if settings.dry else 1500
    clean = dataclasses.replace(config, paste=dataclasses.replace(config.paste, share=0.0))
    corpus = open_corpus(config.data)
    threads = f"{config.data.threads} threads"
    yield figure("without pastes", loader_rate(corpus, clean, samples), "samples/s", threads)
    yield figure("with pastes", loader_rate(corpus, config, samples), "samples/s", threads)
    data = dataclasses.replace(config.data, processes=config.data.threads)
    rate = loader_rate(corpus, dataclasses.replace(config, data=data), samples)
    yield figure("with pastes, in processes", rate, "samples/s", f"{data.processes} processes")
    for row in settings.done:
        if row.name == CONSUMED and row.measured:
            yield at_least(f"in processes, to {row.part}", rate / row.measured, 1, "x")
