"""The most views that can be encoded at a time."""

import math

from simclr_scale.scaling.plan.footprint import Network

_FEWEST = 2  # batch norm has nothing to normalise one view by


def largest_chunk(network: Network, rows: int, budget: int) -> int | None:
    """The largest ``chunk_size`` whose step takes at most ``budget`` bytes; ``rows`` where all fit, None where none.

    Views are cut into equal chunks, so it is their number that is sought: doubled until it suffices, then halved back.
    """

    def suffices(chunks: int) -> bool:
        return network.peak(rows, math.ceil(rows / chunks)).step <= budget

    most = max(1, rows // _FEWEST)
    few, enough = 0, 1
    while not suffices(enough):
        if enough == most:
            return None
        few, enough = enough, min(2 * enough, most)
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if suffices(middle) else (middle, enough)
    return math.ceil(rows / enough)
