"""What a strategy tells about itself, and what its paper promises."""

from typing import NamedTuple


class Headline(NamedTuple):
    """A figure that a paper or project promises, and what it is a figure of.

    `measures` is the column of a profile that it can be held against (`bytes`, `peak`, `ttft`,
    `tpot`), "" where it is a quantity of another kind (a benchmark's score, a throughput); `remark`
    says why, or what else is in it.
    """

    claim: str
    conditions: str
    measures: str = ""
    remark: str = ""


class About(NamedTuple):
    """A method for somebody who does not know it; each a sentence or a formula."""

    keeps: str
    formula: str
    evicts: str
    needs: str
    limits: str
    headlines: tuple[Headline, ...] = ()
