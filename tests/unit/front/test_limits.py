"""The bytes of all connections together."""

from __future__ import annotations

from vernier.front.limits import UNCOUNTED_BYTES, ByteBudget, Charge, available_memory, byte_budget
from vernier.settings import Settings


class Permit:
    released = 0

    def release(self) -> None:
        self.released += 1


def test_what_has_arrived_is_counted_and_given_back_once() -> None:
    budget, permit = ByteBudget(100_000), Permit()
    charge = Charge(budget, permit)
    assert charge.grow(60_000) is None
    assert charge.grow(40_001) is not None
    assert (charge.nbytes, budget.used) == (60_000, 60_000)
    assert charge.grow(40_000) is None
    charge.release()
    charge.release()
    assert (budget.used, permit.released) == (0, 1)


def test_what_is_there_already_is_counted_beyond_the_limit_and_keeps_others_out() -> None:
    budget = ByteBudget(100)
    unread = Charge(budget)
    unread.set(150)
    assert Charge(budget).grow(UNCOUNTED_BYTES + 1) is not None
    small = Charge(budget)
    assert small.grow(UNCOUNTED_BYTES) is None
    assert small.grow(1) is not None
    small.release()
    assert budget.refusal(1) is not None
    unread.set(20)
    assert budget.used == 20
    assert budget.refusal(80) is None


def test_an_error_says_when_to_come_back() -> None:
    refusal = ByteBudget(100).refusal(101)
    assert refusal is not None
    assert (refusal.http_status, refusal.code, refusal.retry_after_s) == (503, "overloaded", 1.0)
    assert "VERNIER_MAX_INFLIGHT_BYTES" in refusal.message


def test_the_limit_is_a_share_of_the_memory_and_holds_the_largest_body() -> None:
    mib = 2**20
    assert byte_budget(Settings(), memory_bytes=lambda: 64 * 1024 * mib).limit == 512 * mib
    assert byte_budget(Settings(), memory_bytes=lambda: 1024 * mib).limit == 256 * mib
    assert byte_budget(Settings(), memory_bytes=lambda: 100 * mib).limit == 64 * mib
    settings = Settings(max_inflight_bytes=7, max_body_bytes=3)
    assert [byte_budget(settings, fronts).limit for fronts in (1, 2, 4)] == [7, 3, 3]
    assert available_memory() > 100 * mib
