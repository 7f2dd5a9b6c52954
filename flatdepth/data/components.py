"""Connected components of a map of numbers."""

import numpy as np
from jaxtyping import Int64, UInt8


def components(values: UInt8[np.ndarray, "h w"]) -> Int64[np.ndarray, "h w"]:
    """Numbers 1, 2, ... of the areas of one value, in the order of their first pixels; 0 where 0.

    Pixels that touch at a side or a corner belong together. Runs along the rows are joined to
    those of the next row that they touch: every joined run takes the smallest number that it or one
    of its neighbours knows, until none changes, with pointer jumping (Shiloach and Vishkin 1982).
    """
    height, width = values.shape
    starts = np.ones((height, width), bool)
    starts[:, 1:] = values[:, 1:] != values[:, :-1]
    run = starts.ravel().cumsum().reshape(height, width) - 1
    pairs = [np.zeros((0, 2), np.int64)]
    for shift in (-1, 0, 1):
        here = slice(max(0, -shift), width - max(0, shift))
        below = slice(max(0, shift), width - max(0, -shift))
        same = (values[:-1, here] == values[1:, below]) & (values[:-1, here] > 0)
        pairs.append(np.stack([run[:-1, here][same], run[1:, below][same]], axis=1))
    one, other = np.unique(np.concatenate(pairs), axis=0).T
    root = np.arange(run[-1, -1] + 1)
    while True:
        lower = np.minimum(root[one], root[other])
        joined = root.copy()
        np.minimum.at(joined, root[one], lower)
        np.minimum.at(joined, root[other], lower)
        joined = joined[joined]
        if np.array_equal(joined, root):
            break
        root = joined
    area = np.where(values > 0, root[run] + 1, 0)
    kept, numbers = np.unique(area, return_inverse=True)
    return numbers.reshape(height, width) + int(kept[0] != 0)
