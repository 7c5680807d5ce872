"""What waits in the database holds back what is less urgent."""

from stent.services.precedence import COMING_SECONDS, Precedence


def rows(*priorities: int) -> list[dict[str, int]]:
    return [{"priority": priority} for priority in priorities]


def test_nothing_waits() -> None:
    """Then nothing is held back, however low."""
    assert not Precedence().holds_back(-(2**15))


def test_full_claim_holds_back_what_is_below_its_last() -> None:
    """More of the last priority may be left, of higher ones there is none."""
    precedence = Precedence()
    precedence.claimed(rows(9, 5), more=True)
    assert [precedence.holds_back(p) for p in (4, 5, 9)] == [True, False, False]
    precedence.claimed(rows(5), more=False)
    assert not precedence.holds_back(4)
    precedence.claimed(rows(5), more=True)
    precedence.claimed([], more=True)
    assert not precedence.holds_back(4)


def test_what_becomes_a_task_holds_back_until_it_is_claimed() -> None:
    """Nobody says when that is, so it counts for a while; the most urgent counts."""
    now = 100.0
    precedence = Precedence(lambda: now)
    precedence.queued(5)
    precedence.queued(0)
    assert [precedence.holds_back(p) for p in (4, 5)] == [True, False]
    precedence.claimed(rows(5), more=False)
    assert precedence.holds_back(4)
    now += COMING_SECONDS
    assert not precedence.holds_back(4)
    precedence.queued(0)
    assert [precedence.holds_back(p) for p in (-1, 4)] == [True, False]
