"""What waits for slots holds back what is less urgent."""

from stent.services.precedence import Precedence
from stent.store.store import BELOW_ALL

LOWEST = -(2**15)


def held_back(precedence: Precedence, *priorities: int) -> list[bool]:
    return [precedence.holds_back(priority) for priority in priorities]


def test_nothing_waits() -> None:
    """Then nothing is held back, however low."""
    assert not Precedence().holds_back(LOWEST)


def test_what_a_claim_leaves_holds_back_what_is_below() -> None:
    """Until the next claim, which leaves nothing."""
    precedence = Precedence()
    precedence.begin_claim()
    precedence.end_claim(5)
    assert held_back(precedence, 4, 5, 9) == [True, False, False]
    precedence.begin_claim()
    assert precedence.holds_back(4)
    precedence.end_claim()
    assert not precedence.holds_back(LOWEST)


def test_what_is_being_inserted_holds_back_until_a_claim_that_sees_it() -> None:
    """One that began before may have missed it."""
    precedence = Precedence()
    coming = precedence.queued(None, 5)
    assert held_back(precedence, 4, 5) == [True, False]
    precedence.begin_claim()
    precedence.inserted(coming)
    precedence.end_claim()
    assert precedence.holds_back(4)
    precedence.begin_claim()
    assert precedence.holds_back(4)
    precedence.end_claim()
    assert not precedence.holds_back(LOWEST)


def test_the_most_urgent_of_several_counts() -> None:
    """Each is withdrawn by itself; an execution counts once, by its highest."""
    precedence = Precedence()
    one = precedence.queued(precedence.queued(None, 1), 7)
    other = precedence.queued(None, 3)
    assert (one, precedence.queued(one, 2)) == (7, 7)
    assert precedence.holds_back(6)
    precedence.dropped(one)
    assert held_back(precedence, 2, 3) == [True, False]
    precedence.dropped(other)
    assert not precedence.holds_back(LOWEST)


def test_claim_that_failed_is_repeated() -> None:
    """What it would have seen counts until then."""
    precedence = Precedence()
    precedence.inserted(precedence.queued(None, 0))
    precedence.begin_claim()
    precedence.begin_claim()
    assert precedence.holds_back(-1)
    precedence.end_claim(BELOW_ALL)
    assert not precedence.holds_back(LOWEST)
