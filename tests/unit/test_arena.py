"""The arena by random programs, against a model that knows only what was handed out."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pygpukit_torch import native

GRANULE = 512
PAGES = 24


def remove(
    arena: native.Arena, block: int, first: int, count: int, removed: int | None = None
) -> None:
    arena.retire(block, first, count)
    arena.check_invariants()
    arena.finish_retirement(first, count, count if removed is None else removed)


class ArenaMachine(RuleBasedStateMachine):
    """Allocates, frees, adds and removes pages; knows every live block and resident page."""

    @initialize(page_granules=st.sampled_from([1, 4, 16]))
    def start(self, page_granules: int) -> None:
        self.page = page_granules
        self.arena = native.Arena(page_granules * GRANULE, PAGES)
        self.live: dict[int, int] = {}
        self.resident: set[int] = set()

    def hand_out(self, start: int, granules: int) -> None:
        for other, size in self.live.items():
            assert start + granules <= other or other + size <= start, "blocks overlap"
        pages = range(start // self.page, (start + granules - 1) // self.page + 1)
        assert self.resident.issuperset(pages), "a block lies on pages that are not resident"
        self.live[start] = granules

    def longest_resident_gap(self) -> int:
        taken = {g for start, size in self.live.items() for g in range(start, start + size)}
        longest = run = 0
        for granule in range(PAGES * self.page):
            idle = granule // self.page in self.resident and granule not in taken
            run = run + 1 if idle else 0
            longest = max(longest, run)
        return longest

    @rule(granules=st.integers(1, 80))
    def allocate(self, granules: int) -> None:
        fits = granules <= self.longest_resident_gap()
        start = self.arena.allocate(granules)
        assert (start is not None) == fits
        if start is not None:
            self.hand_out(start, granules)

    @rule(granules=st.integers(1, 80))
    def grow_and_allocate(self, granules: int) -> None:
        if granules <= self.longest_resident_gap():
            return
        # As its owner does: what is cached merges before growth is planned.
        assert self.arena.allocate(granules) is None
        plan = self.arena.plan_growth(granules)
        if plan is None:
            return
        first, count = plan
        new = set(range(first, first + count))
        assert new.isdisjoint(self.resident)
        assert max(new) < PAGES
        self.arena.add_pages(first, count)
        self.resident |= new
        start = self.arena.allocate(granules)
        assert start is not None, "the planned pages did not suffice"
        self.hand_out(start, granules)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.live:
            start = data.draw(st.sampled_from(sorted(self.live)))
            assert self.arena.release(start) == self.live.pop(start)

    @rule(start=st.integers(0, 2 * PAGES * 16))
    def release_of_what_is_not_live(self, start: int) -> None:
        if start not in self.live:
            with pytest.raises(ValueError, match="no live block"):
                self.arena.release(start)

    @rule(data=st.data())
    def remove_pages(self, data: st.DataObject) -> None:
        runs = self.arena.free_runs()
        taken = {g // self.page for s, n in self.live.items() for g in range(s, s + n)}
        assert sum(count for _, _, count in runs) == len(self.resident - taken)
        if runs:
            block, first, count = data.draw(st.sampled_from(runs))
            keep = data.draw(st.integers(0, count - 1))
            removed = data.draw(st.integers(0, count - keep))
            remove(self.arena, block, first + keep, count - keep, removed)
            self.resident -= set(range(first + count - removed, first + count))

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "arena"):
            return
        self.arena.check_invariants()
        taken = {g // self.page for s, n in self.live.items() for g in range(s, s + n)}
        assert self.arena.used_bytes == sum(self.live.values()) * GRANULE
        assert self.arena.live_blocks == len(self.live)
        assert self.arena.resident_pages == len(self.resident)
        assert self.arena.count_free_pages() == len(self.resident - taken)


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=500, stateful_step_count=40)


@pytest.mark.parametrize("granules", [1, 511, 512, 513, 5000, 100_000])
def test_a_freed_block_serves_the_next_request_of_its_size(granules: int) -> None:
    arena = native.Arena(64 << 20, 4)
    arena.add_pages(0, 4)
    arena.allocate(3)
    start = arena.allocate(granules)
    arena.allocate(5)
    arena.release(start)
    assert arena.allocate(granules) == start


def test_a_large_request_merges_what_is_cached_before_it_cuts_a_free_block() -> None:
    mib = (1 << 20) // GRANULE
    arena = native.Arena(32 << 20, 1)
    arena.add_pages(0, 1)
    blocks = [arena.allocate(mib) for _ in range(4)]
    guard = arena.allocate(1)
    for block in blocks:
        arena.release(block)
    assert arena.allocate(3 * mib) == 0, "it fits where the four were, not where 27 MiB are left"
    assert arena.allocate(mib) == 3 * mib
    arena.release(guard)


def test_growth_takes_the_fewest_pages() -> None:
    arena = native.Arena(4 * GRANULE, 16)
    arena.add_pages(0, 1)
    arena.add_pages(8, 1)
    arena.allocate(4)  # fills page 0
    arena.allocate(2)  # half of page 8
    # Page 8 has two granules free at its end: six more need one page there, two elsewhere.
    assert arena.plan_growth(6) == (9, 1)


def test_growth_joins_both_sides_of_a_hole() -> None:
    arena = native.Arena(4 * GRANULE, 3)
    arena.add_pages(0, 3)
    first = arena.allocate(12)
    arena.release(first)
    assert arena.free_runs() == [(0, 0, 3)]
    remove(arena, 0, 1, 1)
    # Four granules free on each side: ten need the page between them.
    assert arena.plan_growth(10) == (1, 1)
    arena.add_pages(1, 1)
    assert arena.allocate(10) == 0


def test_free_runs_leave_out_what_borders_on_planned_pages() -> None:
    arena = native.Arena(4 * GRANULE, 8)
    arena.add_pages(0, 6)
    blocks = [arena.allocate(4) for _ in range(6)]
    for index in (0, 1, 3, 5):
        arena.release(blocks[index])
    assert sorted(arena.free_runs()) == [(0, 0, 2), (12, 3, 1), (20, 5, 1)]
    assert sorted(arena.free_runs((6, 2))) == [(0, 0, 2), (12, 3, 1)]


def test_a_long_random_walk_over_many_sizes() -> None:
    """Sizes from a granule to half a page of 32 MiB, which the small model above cannot reach."""
    choice = random.Random(7)
    arena = native.Arena(32 << 20, 64)
    live: list[int] = []
    for step in range(20_000):
        if live and choice.random() < 0.5:
            arena.release(live.pop(choice.randrange(len(live))))
            continue
        granules = int(2 ** choice.uniform(0, 15))
        start = arena.allocate(granules)
        if start is None:
            plan = arena.plan_growth(granules)
            if plan is None or arena.resident_pages + plan[1] > 16:
                for block, first, count in arena.free_runs():
                    remove(arena, block, first, count)
                continue
            arena.add_pages(*plan)
            start = arena.allocate(granules)
        assert start is not None
        live.append(start)
        if step % 1000 == 0:
            arena.check_invariants()
    for start in live:
        arena.release(start)
    arena.check_invariants()
    assert arena.used_bytes == 0
    assert arena.count_free_pages() == arena.resident_pages


@pytest.mark.parametrize(("page_bytes", "pages"), [(3 * GRANULE, 4), (256, 4), (GRANULE, 0)])
def test_impossible_arenas_are_refused(page_bytes: int, pages: int) -> None:
    with pytest.raises(ValueError, match="not possible"):
        native.Arena(page_bytes, pages)


@pytest.mark.parametrize(("first", "count"), [(0, 0), (0, 9), (7, 2), (1, 1), (100, 1)])
def test_pages_that_are_no_hole_cannot_be_added(first: int, count: int) -> None:
    arena = native.Arena(GRANULE, 8)
    arena.add_pages(1, 1)
    with pytest.raises(ValueError, match="one hole"):
        arena.add_pages(first, count)
    arena.check_invariants()


@pytest.mark.parametrize("run", [(0, 0, 0), (0, 0, 4), (0, 2, 1), (3, 3, 1), (99, 99, 1)])
def test_pages_that_are_not_free_cannot_be_retired(run: tuple[int, int, int]) -> None:
    arena = native.Arena(GRANULE, 8)
    arena.add_pages(0, 3)
    arena.allocate(1)
    with pytest.raises(ValueError, match="one free block"):
        arena.retire(*run)
    arena.check_invariants()


def test_only_what_is_retired_can_be_ended() -> None:
    arena = native.Arena(GRANULE, 8)
    arena.add_pages(0, 3)
    for run in [(0, 3, 3), (0, 3, 0), (5, 1, 1), (99, 1, 1)]:
        with pytest.raises(ValueError, match="is retired"):
            arena.finish_retirement(*run)
    arena.retire(0, 0, 3)
    with pytest.raises(ValueError, match="is retired"):
        arena.finish_retirement(0, 2, 2)
    arena.check_invariants()


class LaneMachine(RuleBasedStateMachine):
    """Lanes and fences: what was released on one lane is only handed out there again."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = native.Arena(4 * GRANULE, PAGES)
        self.lanes = [0]
        self.owner = {}  # granule: the lane it may be handed out on
        self.live: dict[int, tuple[int, int]] = {}  # start: granules, lane
        self.fenced: dict[int, tuple[int, int]] = {}

    @rule()
    def add_lane(self) -> None:
        if len(self.lanes) < 4:
            self.lanes.append(self.arena.add_lane())

    @rule(data=st.data(), granules=st.integers(1, 12))
    def allocate(self, data: st.DataObject, granules: int) -> None:
        lane = data.draw(st.sampled_from(self.lanes))
        start = self.arena.allocate(granules, lane)
        if start is None:
            plan = self.arena.plan_growth(granules, lane)
            if plan is None:
                return
            self.arena.add_pages(*plan, lane)
            for granule in range(plan[0] * 4, (plan[0] + plan[1]) * 4):
                self.owner[granule] = lane
            start = self.arena.allocate(granules, lane)
            assert start is not None
        for granule in range(start, start + granules):
            assert self.owner.pop(granule) == lane
        self.live[start] = (granules, lane)

    @rule(data=st.data(), fenced=st.booleans())
    def release(self, data: st.DataObject, fenced: bool) -> None:
        if not self.live:
            return
        start = data.draw(st.sampled_from(sorted(self.live)))
        granules, lane = self.live.pop(start)
        if fenced:
            assert self.arena.fence(start) == granules
            self.fenced[start] = (granules, lane)
        else:
            assert self.arena.release(start) == granules
            self.owner.update(dict.fromkeys(range(start, start + granules), lane))

    @rule(data=st.data())
    def unfence(self, data: st.DataObject) -> None:
        if self.fenced:
            start = data.draw(st.sampled_from(sorted(self.fenced)))
            granules, lane = self.fenced.pop(start)
            self.arena.unfence(start)
            self.owner.update(dict.fromkeys(range(start, start + granules), lane))

    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        source, target = (
            data.draw(st.permutations(self.lanes))[:2] if len(self.lanes) > 1 else (0, 0)
        )
        if source != target:
            self.arena.adopt(source, target)
            for granule, lane in self.owner.items():
                if lane == source:
                    self.owner[granule] = target

    @rule(data=st.data())
    def remove_pages(self, data: st.DataObject) -> None:
        if runs := self.arena.free_runs():
            block, first, count = data.draw(st.sampled_from(runs))
            remove(self.arena, block, first, count)
            for granule in range(first * 4, (first + count) * 4):
                del self.owner[granule]

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.arena.check_invariants()
        assert self.arena.used_bytes == sum(size for size, _ in self.live.values()) * GRANULE
        assert self.arena.fenced_bytes == sum(size for size, _ in self.fenced.values()) * GRANULE


TestLanes = LaneMachine.TestCase
TestLanes.settings = settings(max_examples=300, stateful_step_count=40)
