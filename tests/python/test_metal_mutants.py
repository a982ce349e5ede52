"""tests/metal/mutants.txt belongs to the kernel texts as they are; its first line to the others."""

import re
import sys
from pathlib import Path

METAL = Path(__file__).parents[1] / "metal"
sys.path.insert(0, str(METAL))

import mutate  # noqa: E402
from mutants import MUTANTS  # noqa: E402

TEXT = (METAL / "mutants.txt").read_text()


def test_every_listed_mutant_can_be_planted():
    plantable = {f"{m[0]}: {m[1]!r} -> {m[2]!r}" for m in [*MUTANTS, *mutate.all_mutants()]}
    gone = set(mutate.outcomes(TEXT)) - plantable
    assert not gone, "the kernel texts have changed: python tests/metal/mutate.py --resume ..."


def test_at_least_95_percent_are_killed():
    head, *lines = TEXT.splitlines()
    killed = sum(line.startswith("killed") for line in lines)
    equivalent = sum("(equivalent: " in line for line in lines)
    told = re.search(r"(\d+) mutants, (\d+) killed, (\d+) equivalent, (\d+) alive", head)
    assert [len(lines), killed, equivalent] == [int(n) for n in told.groups()[:3]]
    assert killed >= 0.95 * (len(lines) - equivalent)
