"""A binary heap in two arrays, for compiled searches: what to order by, and what is ordered."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..compiled import compiled


@compiled
def push(orders: Any, items: npt.NDArray[np.int32], count: int, order: Any, item: int) -> None:
    """Add an item to a heap of `count`; there must be room for it."""
    at = count
    while at > 0 and orders[(at - 1) >> 1] > order:
        orders[at] = orders[(at - 1) >> 1]
        items[at] = items[(at - 1) >> 1]
        at = (at - 1) >> 1
    orders[at] = order
    items[at] = item


@compiled
def pop(orders: Any, items: npt.NDArray[np.int32], count: int) -> None:
    """Remove the first item of a heap of `count`, of least order."""
    count -= 1
    order, item = orders[count], items[count]
    at = 0
    while 2 * at + 1 < count:
        child = 2 * at + 1
        if child + 1 < count and orders[child + 1] < orders[child]:
            child += 1
        if orders[child] >= order:
            break
        orders[at] = orders[child]
        items[at] = items[child]
        at = child
    orders[at] = order
    items[at] = item
