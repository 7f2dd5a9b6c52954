"""Processes that prepare samples: the same samples, whoever is killed."""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from flatdepth.augment.rng import Draws
from flatdepth.cli import parse_config
from flatdepth.config import TrainConfig
from flatdepth.data.frames import open_corpus
from flatdepth.data.loader import Sample, training_samples
from flatdepth.data.workers import Workers
from flatdepth.errors import UserError
from tests.conftest import REPOSITORY, TinySets
from tests.working import answering, broken


def children() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if any("serve()" in part for part in child.cmdline())
    ]


@pytest.fixture
def workers():  # type: ignore[no-untyped-def]
    made: Workers[object, object] = Workers(partial(answering, 41), 2)
    yield made
    made.close()
    assert not children()


def test_what_threads_ask_is_computed_elsewhere(workers: Workers[object, object]) -> None:
    arrays = [np.arange(n * 3, dtype=np.float32).reshape(3, n) for n in (0, 5, 400_000)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(workers, arrays * 3))
        pids = set(pool.map(workers, ["pid"] * 8))
    for array, answer in zip(arrays * 3, found, strict=True):
        assert isinstance(answer, dict)
        np.testing.assert_array_equal(answer["twice"], 2 * array)
        np.testing.assert_array_equal(answer["fortran"], array)
        answer["twice"][...] = 0  # it is our own
    assert os.getpid() not in pids and len(pids) <= 2
    assert workers("anything") == 41


def test_errors_come_back_with_their_traceback(workers: Workers[object, object]) -> None:
    with pytest.raises(UserError, match=r"^shard 9 is damaged$"):
        workers("refuse")
    with pytest.raises(KeyError) as caught:
        workers("fail")
    assert 'raise KeyError("no such thing")' in caught.value.__notes__[0]
    with pytest.raises(Exception, match="pickle"):
        workers("unpicklable")
    assert workers("anything") == 41


def test_what_cannot_be_made_says_so_to_every_task() -> None:
    workers: Workers[object, object] = Workers(partial(broken, 0), 1)
    for _ in range(2):
        with pytest.raises(UserError, match="nothing there"):
            workers("anything")
    workers.close()


def test_printing_is_no_result(
    workers: Workers[object, object], capfd: pytest.CaptureFixture[str]
) -> None:
    assert workers("print") == "printed"
    workers.close()
    out, err = capfd.readouterr()
    assert out == "" and "said on standard output" in err


def test_one_that_was_killed_is_replaced(
    workers: Workers[object, object], capsys: pytest.CaptureFixture[str]
) -> None:
    before = workers("pid")
    assert isinstance(before, int)
    os.kill(before, signal.SIGKILL)
    assert workers("pid") != before
    assert capsys.readouterr().err.count("was ended by the system; another one") == 1
    with pytest.raises(UserError, match=r"data\.processes: 3 processes .* take fewer"):
        workers("die")
    assert workers("anything") == 41


def test_closing_ends_what_is_being_done(workers: Workers[object, object]) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(workers, "wait")
        while not children():
            time.sleep(0.01)
        workers.close()
        with pytest.raises((EOFError, OSError)):
            waiting.result()
    with pytest.raises(EOFError):
        workers("anything")


def test_they_end_with_the_program_that_was_killed() -> None:
    """Also while they work; and a script needs no guard."""
    script = """
        import os, sys, threading, time
        from functools import partial
        from flatdepth.data.workers import Workers
        from tests.test_workers import children
        from tests.working import answering

        workers = Workers(partial(answering, 0), 1)
        workers("pid")
        threading.Thread(target=workers, args=("wait",), daemon=True).start()
        print(*(child.pid for child in children()), flush=True)
        time.sleep(600)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    ) as program:
        assert program.stdout is not None
        (pid,) = map(int, program.stdout.readline().split())
        worker = psutil.Process(pid)
        program.kill()
    worker.wait(timeout=60)


def configured(path: Path) -> TrainConfig:
    return parse_config(TrainConfig, [f"--config={path}"], prog="train.py", description=None)


def take(config: TrainConfig, first_step: int, count: int, rank: int = 0) -> list[Sample]:
    """The first samples of one of two ranks from a step on."""
    stream = training_samples(
        open_corpus(config.data), config, first_step=first_step, rank=rank, ranks=2, accumulation=2
    )
    samples = list(itertools.islice(itertools.chain.from_iterable(stream), count))
    stream.close()
    return samples


def assert_same(one: object, other: object) -> None:
    """Bit for bit, arrays in dataclasses and tuples included; not how long it took."""
    assert type(one) is type(other)
    if dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            if field.compare:
                assert_same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, tuple | list):
        assert len(one) == len(other)  # type: ignore[arg-type]
        for pair in zip(one, other, strict=True):  # type: ignore[call-overload]
            assert_same(*pair)
    elif isinstance(one, np.ndarray):
        assert isinstance(other, np.ndarray)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()
    elif isinstance(one, Draws):
        assert vars(one) == vars(other)
    else:
        assert one == other


@pytest.mark.parametrize("loader", ["indexed", "webdataset"])
def test_samples_are_those_of_threads(
    tiny_sets: TinySets,
    tmp_path: Path,
    loader: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the same order, from any step, for any rank, though a process is killed on the way."""
    settings = {"paste__share": 1.0, "data__loader": loader}
    config = configured(tiny_sets.config(tmp_path, **settings))
    other = configured(tiny_sets.config(tmp_path, **settings, data__processes=2))
    whole = take(config, 1, 24, rank=1)
    assert sum(len(sample.plan) for sample in whole) > 12

    def kill_one() -> None:
        while not (started := children()):
            time.sleep(0.01)
        started[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    apart = take(other, 1, 24, rank=1)
    assert_same(apart, whole)
    assert all(0 < sample.seconds["decode"] < 60 for sample in apart)
    killer.join()
    assert "another one goes on" in capsys.readouterr().err
    if loader == "indexed":  # streams begin anew where they are entered
        part = take(other, 2, 4, rank=1)
        assert_same(part, whole[2 * config.micro_batch :][:4])


def test_a_set_that_was_changed_meanwhile_is_refused(tiny_sets: TinySets, tmp_path: Path) -> None:
    config = configured(tiny_sets.config(tmp_path, data__processes=1))
    corpus = open_corpus(config.data)
    changed = dataclasses.replace(corpus, digests=dict.fromkeys(corpus.digests, "0" * 64))
    stream = training_samples(changed, config, first_step=0, rank=0, ranks=1, accumulation=1)
    with pytest.raises(UserError, match="was changed while the run began"):
        next(stream)
    stream.close()
