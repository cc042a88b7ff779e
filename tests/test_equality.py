"""What people hold in Python can be compared and put into sets: `==` gives a bool, and a frozen thing has a hash."""

from __future__ import annotations

import torch

from tests import dataclasses_of_arrays as found
from tlcapture import Ablate, Sampling, Steer
from tlcapture.generation.sampling.processors import LogitRules


def test_a_dataclass_that_holds_arrays_is_equal_to_itself_alone() -> None:
    every = list(found.dataclasses())
    wrong = [f"{each.module}.{each.name}" for each in every if each.compares and found.has_arrays(each)]
    assert not wrong, "give their decorators eq=False"
    assert len(every) > 200


def test_arrays_are_found_behind_aliases_and_in_other_dataclasses() -> None:
    names = {each.name for each in found.dataclasses() if found.has_arrays(each)}
    assert {"ChanceLevel", "Dynamics", "ResidualStream", "TraitVector", "ChangePoints"} <= names
    assert not {"Selection", "TokenSpan", "TopTrait", "Sampling"} & names


def test_equal_samplings_have_equal_hashes_even_with_rules_that_are_lists() -> None:
    ways = [Sampling(0.5, rules=LogitRules(suppress_tokens=[1, 2]), stop=["a"]) for _ in range(2)]
    assert ways[0] == ways[1] and hash(ways[0]) == hash(ways[1])
    assert len({*ways, Sampling(0.5, rules=LogitRules(suppress_tokens=[1]), stop=["a"])}) == 2


def test_interventions_are_equal_by_value_and_own_vectors_by_identity() -> None:
    own, other = torch.ones(4), torch.ones(4)
    given = [Steer("a/b", 0.2), Steer("a/b", 0.2), Steer("a/b", 0.2000001), Ablate("a/b"), Ablate(own, 1)]
    assert len({*given, Ablate(own, layers=[1]), Ablate(other, 1)}) == 5
    assert given[0] == given[1] != given[2]
