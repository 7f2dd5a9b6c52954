"""Kill a training at random instants, also while it saves, and compare what it becomes.

flatdepth crash_test --trials 100 --out DIR                 a run of seconds on the rendered rooms
flatdepth crash_test --trials 20 --out DIR --config FILE    your own; take few steps

Each trial is resumed to its end. Weights, losses and validations must equal those of a run that was
never disturbed, to the last bit; exit code 1 says that one did not. CPU only: a GPU adds up in
another order each time.
"""

import os
import shutil
from pathlib import Path

from flatdepth.bench.crash import Trial, crash_trials
from flatdepth.cli import Parser, as_called, called, number, parse_config
from flatdepth.config import SEED, TrainConfig
from flatdepth.resources import CONFIGS

TINY = CONFIGS / "crash_test.yaml"


def main(argv: list[str]) -> int:
    """Parse the command line and run the trials."""
    parser = Parser(prog=called("crash_test"), description=as_called("crash_test", __doc__))
    parser.add_argument("--trials", type=number(1, 10**6), default=20, help="kills (default: 20)")
    parser.add_argument(
        "--seed", type=number(*SEED), default=0, help="of the instants (default: 0)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where runs go")
    own, others = parser.parse_known_args(argv)
    arguments = others or [f"--config={TINY}"]
    config = parse_config(TrainConfig, arguments, prog=called("crash_test"), description=None)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    log = own.out.with_name(f"{own.out.name}.log")
    found: list[Trial] = []
    for trial in crash_trials(config, own.out, trials=own.trials, seed=own.seed, log=log):
        found.append(trial)
        print(f"{len(found):4d}/{own.trials}  {text(trial)}", flush=True)
        if not trial.differences:
            shutil.rmtree(own.out / f"trial-{len(found) - 1:03d}")
    bad = sum(bool(trial.differences) for trial in found)
    torn = sum(bool(trial.torn) for trial in found)
    late = sum(trial.ended for trial in found)
    print(
        f"{len(found)} trials: {torn} left a half-written checkpoint, {late} were through before "
        f"the kill; {len(found) - bad} ended bit for bit as the undisturbed run, {bad} did not"
    )
    return int(bad > 0)


def text(trial: Trial) -> str:
    """A trial in one line."""
    torn = f", half-written: {', '.join(map(str, trial.torn))}" if trial.torn else ""
    left = f"checkpoint of step {trial.newest}" if trial.newest else "no checkpoint"
    end = "through before the kill" if trial.ended else f"killed after {trial.after:.2f} s"
    same = f"DIFFERENT {', '.join(trial.differences)}" if trial.differences else "same bits"
    return f"{trial.aim}: {end}; left {left}{torn}; {same}"
