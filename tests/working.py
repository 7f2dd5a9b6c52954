"""What the processes of test_workers.py compute; it imports little, for they start often."""

import os
import signal
import time
from collections.abc import Callable

import numpy as np

from flatdepth.errors import UserError


def answering(secret: int) -> Callable[[object], object]:
    """A function of a few orders."""

    def answer(task: object) -> object:
        if isinstance(task, np.ndarray):
            return {"twice": 2 * task, "fortran": np.asfortranarray(task)}
        match task:
            case "pid":
                return os.getpid()
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "fail":
                raise KeyError("no such thing")
            case "refuse":
                raise UserError("shard 9 is damaged")
            case "print":
                print("said on standard output")
                return "printed"
            case "wait":
                time.sleep(600)
            case "unpicklable":
                return lambda: 0
        return secret

    return answer


def broken(_: object) -> Callable[[object], object]:
    raise UserError("data.train: nothing there")
