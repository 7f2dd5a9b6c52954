"""Figures: metrics, protocols, validation while training, checkpoints side by side, folds."""
