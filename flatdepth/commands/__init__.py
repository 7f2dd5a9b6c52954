"""The commands; ``flatdepth NAME`` imports the module NAME and calls its ``main`` with the rest."""

COMMANDS = {
    "train": "train, evaluate, report; everything of a run is in runs/NAME",
    "pack": "raw data to shard sets; list, verify, merge and export sets",
    "label": "outline mirrors and pictures on your photographs, in a browser",
    "serve": "the workbench: try pastes, compare checkpoints and watch runs, in a browser",
    "preview": "show what training sees, or what a run saw",
    "evaluate": "figures of checkpoints side by side",
    "predict": "depth maps, pictures and point clouds of your images",
    "view": "pictures and their depth in the Rerun viewer, to turn",
    "compare": "pictures through several depth systems side by side",
    "checkpoint": "look into, convert, compare, blend and verify weight files",
    "report": "one page about a run, or about several side by side",
    "crossval": "train and validate once per fold of the scenes",
    "experiment": "train variants of a configuration and judge them on real mirrors and pictures",
    "benchmark": "memory and time of a training, measured",
    "borders": "whether a network can tell where something was pasted",
    "crash_test": "kill a training at random instants and compare what it becomes",
}
