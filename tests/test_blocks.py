"""The block pool against a naive model: every indexed block's whole prefix, written out."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.blocks import BlockPool, PrefixNode
from engine.errors import InvalidArgument

SIZE = 2


class Holder:
    """A sequence as the pool sees it: tokens, a table, and how far it has registered."""

    def __init__(self, pool: BlockPool, tokens: list[int], use_cache: bool = True) -> None:
        self.pool, self.tokens = pool, tokens
        num_blocks = len(tokens) // pool.block_size
        self.hit = pool.match(blocks_of(tokens, pool) if use_cache else ())
        pool.hold(self.hit.blocks)
        self.table = [*self.hit.blocks, *pool.allocate(num_blocks - len(self.hit.blocks))]
        self.node: PrefixNode = self.hit.node
        self.num_registered = len(self.hit.blocks)

    def register_next(self) -> None:
        i = self.num_registered
        self.node = self.pool.register(self.table[i], self.node, blocks_of(self.tokens, self.pool)[i])
        self.num_registered += 1

    def register_all(self) -> Holder:
        while self.num_registered < len(self.table):
            self.register_next()
        return self

    def release(self) -> None:
        self.pool.release(self.table)


def counts(pool: BlockPool) -> tuple[int, int, int]:
    return pool.num_free, pool.num_cached, pool.num_used


def blocks_of(tokens: list[int], pool: BlockPool) -> list[tuple[int, ...]]:
    size = pool.block_size
    return [tuple(tokens[i * size : (i + 1) * size]) for i in range(len(tokens) // size)]


def found(pool: BlockPool, tokens: list[int]) -> tuple[int, ...]:
    return pool.match(blocks_of(tokens, pool)).blocks


def test_a_released_prefix_is_found_again_and_shared() -> None:
    pool = BlockPool(6, SIZE)
    first = Holder(pool, [1, 2, 3, 4]).register_all()
    assert counts(pool) == (4, 0, 2)
    first.release()
    assert counts(pool) == (4, 2, 0) and pool.num_available == 6
    second = Holder(pool, [1, 2, 3, 4, 5, 6])
    third = Holder(pool, [1, 2, 9, 9])
    assert second.table[:2] == first.table and second.hit.num_cached == 2
    assert third.table[0] == first.table[0] and third.hit.num_cached == 0
    assert pool.num_references(first.table[0]) == 2
    pool.check_integrity([second.table, third.table])


def test_only_registered_blocks_are_found() -> None:
    pool = BlockPool(4, SIZE)
    holder = Holder(pool, [1, 2, 3, 4])
    assert found(pool, [1, 2, 3, 4]) == ()
    holder.register_next()
    assert found(pool, [1, 2, 3, 4]) == (holder.table[0],)
    holder.release()
    assert counts(pool) == (3, 1, 0)


def test_a_block_is_known_by_all_the_tokens_before_it() -> None:
    pool = BlockPool(8, SIZE)
    Holder(pool, [1, 1, 7, 7]).register_all()
    assert found(pool, [2, 2, 7, 7]) == () and found(pool, [7, 7]) == ()


def test_equal_hashes_are_not_equal_prefixes() -> None:
    modulus = 2**61 - 1  # CPython hashes integers modulo this prime
    pool = BlockPool(4, SIZE)
    holder = Holder(pool, [0, 1]).register_all()
    twin = [modulus, modulus + 1]
    assert hash(tuple(twin)) == hash((0, 1)), "the two blocks were meant to collide"
    assert found(pool, twin) == () and found(pool, [0, 1]) == (holder.table[0],)


def test_eviction_takes_the_longest_unused_and_children_before_parents() -> None:
    pool = BlockPool(5, SIZE)
    old, new = Holder(pool, [1, 1, 2, 2]).register_all(), Holder(pool, [3, 3, 4, 4]).register_all()
    old.release()
    new.release()
    Holder(pool, [1, 1]).release()  # a use makes it the newest
    order = [pool.allocate(1)[0] for _ in range(5)]
    assert order[1:] == [old.table[1], new.table[1], new.table[0], old.table[0]]
    assert counts(pool) == (0, 0, 5)


def test_free_blocks_go_before_cached_ones() -> None:
    pool = BlockPool(3, SIZE)
    Holder(pool, [1, 1]).register_all().release()
    pool.allocate(2)
    assert len(found(pool, [1, 1])) == 1


def test_two_that_compute_the_same_block_keep_both_and_one_is_indexed() -> None:
    pool = BlockPool(4, SIZE)
    first, second = Holder(pool, [1, 1]), Holder(pool, [1, 1])
    first.register_all()
    second.register_all()
    assert first.table != second.table and found(pool, [1, 1]) == tuple(first.table)
    pool.check_integrity([first.table, second.table])
    first.release()
    second.release()
    assert counts(pool) == (3, 1, 0)


@pytest.mark.parametrize("child_is_held", [True, False])
def test_losing_a_parent_loses_its_children_and_leaks_nothing(child_is_held: bool) -> None:
    pool = BlockPool(3, SIZE)
    parent = Holder(pool, [1, 1]).register_all()
    child = Holder(pool, [1, 1, 2, 2], use_cache=False).register_all()  # its first block is the parent's twin
    parent.release()
    if not child_is_held:
        child.release()
        assert counts(pool) == (1, 2, 0)
        pool.allocate(1)
    pool.allocate(1)  # evicts the parent; cached children are worthless now, and free
    assert found(pool, [1, 1, 2, 2]) == ()
    if child_is_held:
        assert child.node.block is None
        assert pool.register(child.table[0], child.node, (9, 9)) is child.node, "nothing can follow a lost node"
        assert not pool.is_indexed(child.table[0])
        child.release()
        assert counts(pool) == (2, 0, 1)
    else:
        assert counts(pool) == (1, 0, 2)


def test_clear_cache_frees_cached_blocks_now_and_used_ones_when_released() -> None:
    pool = BlockPool(4, SIZE)
    Holder(pool, [1, 1]).register_all().release()
    held = Holder(pool, [2, 2, 3, 3]).register_all()
    pool.clear_cache()
    assert counts(pool) == (2, 0, 2) and found(pool, [2, 2]) == ()
    pool.check_integrity([held.table])
    held.release()
    assert counts(pool) == (4, 0, 0)


def test_without_prefix_caching_nothing_is_found_or_kept() -> None:
    pool = BlockPool(4, SIZE, enable_prefix_caching=False)
    holder = Holder(pool, [1, 1, 2, 2]).register_all()
    assert found(pool, [1, 1]) == ()
    holder.release()
    assert counts(pool) == (4, 0, 0)


def test_misuse_is_noticed() -> None:
    pool = BlockPool(2, SIZE)
    blocks = pool.allocate(1)
    with pytest.raises(AssertionError, match="2 blocks asked for, 1 available"):
        pool.allocate(2)
    with pytest.raises(AssertionError, match="cannot be shared"):
        pool.hold(blocks)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="more often than it was taken"):
        pool.release(blocks)
    with pytest.raises(InvalidArgument, match="not 0 of 16"):
        BlockPool(0, 16)


def test_check_integrity_sees_a_leak() -> None:
    pool = BlockPool(2, SIZE)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check_integrity([])


class PoolMachine(RuleBasedStateMachine):
    """Random use, compared with a flat model: for each indexed block its whole prefix and when it was last let go."""

    @initialize(num_blocks=st.integers(3, 9))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, SIZE)
        self.holders: list[Holder] = []
        self.prefixes: dict[int, tuple[int, ...]] = {}
        self.let_go: dict[int, int] = {}
        self.clock = 0

    def held(self, block: int) -> bool:
        return any(block in holder.table for holder in self.holders)

    def forget(self, block: int) -> None:
        lost = self.prefixes[block]
        self.prefixes = {b: p for b, p in self.prefixes.items() if p[: len(lost)] != lost}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=SIZE, max_size=5 * SIZE), use_cache=st.booleans())
    def take(self, tokens: list[int], use_cache: bool) -> None:
        by_prefix = {prefix: block for block, prefix in self.prefixes.items()}
        expected = []
        for end in range(SIZE, len(tokens) + 1, SIZE):
            if not use_cache or tuple(tokens[:end]) not in by_prefix:
                break
            expected.append(by_prefix[tuple(tokens[:end])])
        num_new = len(tokens) // SIZE - len(expected)
        idle = [b for b in range(self.pool.num_blocks) if not self.held(b) and b not in expected]
        if num_new > len(idle):
            return
        cached = sorted((b for b in idle if b in self.prefixes), key=lambda b: self.let_go[b])
        while len(idle) - len(cached) < num_new:  # the oldest goes, and all that was below it
            self.forget(cached[0])
            cached = [b for b in cached if b in self.prefixes]
        holder = Holder(self.pool, tokens, use_cache)
        assert holder.table[: len(expected)] == expected == list(holder.hit.blocks)
        fresh = holder.table[len(expected) :]
        assert len(set(fresh)) == num_new and set(fresh) <= set(idle)
        assert not any(block in self.prefixes for block in fresh), "a block still indexed was handed out"
        self.holders.append(holder)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        if holder.num_registered == len(holder.table):
            return
        block, end = holder.table[holder.num_registered], (holder.num_registered + 1) * SIZE
        prefix, parent = tuple(holder.tokens[:end]), tuple(holder.tokens[: end - SIZE])
        reachable = holder.node is self.pool.root or holder.node.block in self.prefixes
        holder.register_next()
        known = self.prefixes.values()
        if reachable and (not parent or parent in known) and prefix not in known:
            self.prefixes[block] = prefix

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.holders.remove(holder)
        holder.release()
        for block in reversed(holder.table):
            self.clock += 1
            self.let_go[block] = self.clock

    @rule()
    def clear(self) -> None:
        self.pool.clear_cache()
        self.prefixes = {}

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity([holder.table for holder in self.holders])
        assert {b for b in range(self.pool.num_blocks) if self.pool.is_indexed(b)} == self.prefixes.keys()
        for block, prefix in self.prefixes.items():
            assert found(self.pool, list(prefix))[-1] == block
        assert self.pool.num_used == len({block for holder in self.holders for block in holder.table})
        assert self.pool.num_cached == sum(not self.held(block) for block in self.prefixes)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
