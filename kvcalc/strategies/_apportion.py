"""Whole parts of a budget: exact sums where methods round each part by itself."""

from collections.abc import Sequence
from math import lcm


def apportion(shares: Sequence[float], total: int, caps: Sequence[int]) -> list[int]:
    """`total` in whole parts proportional to `shares`, none above its cap: largest remainders.

    With shares 3, 3, 1 and a total of 5, 2.14, 2.14 and 0.71 are wanted, so that the parts are
    [2, 2, 1]. The sum is exactly `total`, or that of the caps where it is smaller. What a cap cuts
    off goes to the others in proportion; where their shares are all zero they get the same. Equal
    remainders are served in their order.
    """
    ratios = [share.as_integer_ratio() for share in shares]
    common = lcm(*(below for _, below in ratios))
    exact = [above * common // below for above, below in ratios]
    parts = [0] * len(shares)
    left = min(total, sum(caps))
    places = list(range(len(shares)))
    while places:
        weight = sum(exact[place] for place in places)
        if not weight:
            exact = [1] * len(exact)
            continue
        full = {place for place in places if left * exact[place] >= caps[place] * weight}
        if not full:
            break
        for place in full:
            parts[place] = caps[place]
        left -= sum(caps[place] for place in full)
        places = [place for place in places if place not in full]
    remainders = {}
    for place in places:
        parts[place], remainders[place] = divmod(left * exact[place], weight)
    left -= sum(parts[place] for place in places)
    for place in sorted(places, key=remainders.__getitem__, reverse=True)[:left]:
        parts[place] += 1
    return parts


def head_budgets(hits: Sequence[int], budget: int, alpha: float, caps: Sequence[int]) -> list[int]:
    """Tokens for each KV head of a layer, `budget` on average (Ada-KV, arXiv:2407.11550).

    `hits` counts how many of the layer's best rows are a head's; a part `alpha` of the budget is
    split evenly, so that no head is left with nothing. Ada-KV rounds each head by itself.
    """
    evenly = round(alpha * 10**9)  # parameters have nine decimals
    shares = [(10**9 - evenly) * count + evenly * budget for count in hits]
    return apportion(shares, budget * len(hits), caps)
