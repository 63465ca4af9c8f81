"""The pool of KV-cache blocks: reference counts, prefix cache, eviction. Bookkeeping only; no K or V lives here.

A block is `block_size` consecutive slots of the paged cache, the same ones in every layer. At any time each block is in
exactly one of three sets:

    free    nobody holds it and nothing known is in it
    cached  nobody holds it, but it is indexed: its content can be used again; evicted, oldest first, when free is empty
    used    held by at least one sequence (reference count >= 1), indexed or not

The index is a tree. A node is one full block of tokens below the blocks before it, so a path from the root is a prefix
and a lookup compares the tokens themselves: two different prefixes can never be taken for each other, whatever their
hashes. A block enters the index only by `register`, after the step that computed its last token has run. When two
sequences compute the same block at the same time both keep theirs and the first to register is indexed.

Eviction. A sequence's blocks are released last to first, so a child is normally older than its parent and goes first.
The exception is a child whose parent is the other sequence's twin: its parent may go before it. Nothing below a lost
node can be found any more, so the whole subtree leaves the index with it: held blocks stay with their holders and
become free when released, cached ones become free at once.

Ownership, in half-open intervals over a sequence that holds a table of B blocks, R of them registered, with K and V of
tokens [0, n) computed, R = n // block_size:

    blocks [0, R)                  full and computed; maybe shared, maybe indexed: read only
    blocks [R, B)                  private to the sequence, never indexed
    slots  [n, B * block_size)     the only ones a step may write for this sequence
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from engine.errors import InvalidArgument


@dataclass(eq=False, slots=True)
class PrefixNode:
    """One indexed block: its tokens, where its K and V are, and what was seen to follow it."""

    parent: PrefixNode | None  # None: the root
    tokens: tuple[int, ...]  # block_size ids, marked as `Sequence.block_key` does; () for the root
    block: int | None  # None: the root, or a node that has left the index
    children: dict[tuple[int, ...], PrefixNode] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The longest indexed prefix of some tokens. Holds no references: stale after any other call to the pool."""

    blocks: tuple[int, ...]
    node: PrefixNode  # of the last block; the root where there is none
    num_cached: int  # how many of the blocks nobody holds, so that holding them shrinks `num_available`


class BlockPool:
    """`num_blocks` KV-cache blocks of `block_size` tokens. Deterministic; not thread-safe.

    Without prefix caching nothing is ever indexed, so `match` finds nothing and the cached set stays empty.
    Raises InvalidArgument unless both sizes are positive.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise InvalidArgument(f"a pool needs at least 1 block of 1 token, not {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.root = PrefixNode(None, (), None)
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: low numbers first, then the last freed
        self._cached: dict[int, None] = {}  # in order of release: the first is the next to be evicted
        self._nodes: dict[int, PrefixNode] = {}  # by block: all that is indexed

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: free ones, and cached ones by eviction."""
        return len(self._free) + len(self._cached)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, keys: Iterable[tuple[int, ...]]) -> PrefixHit:
        """Find the longest indexed prefix; keys: the tokens of its full blocks in order. Changes nothing."""
        node, blocks = self.root, []
        for tokens in keys:
            child = node.children.get(tokens)
            if child is None:
                break
            assert child.block is not None, "a node in the tree has no block"
            node = child
            blocks.append(child.block)
        return PrefixHit(tuple(blocks), node, sum(block in self._cached for block in blocks))

    def hold(self, blocks: Iterable[int]) -> None:
        """Take one more reference to each of these indexed blocks (a hit of `match`)."""
        for block in blocks:
            assert block in self._nodes, f"block {block} is not indexed and cannot be shared"
            self._cached.pop(block, None)
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` blocks with unknown content and one reference each; the caller knows there are enough."""
        assert count <= self.num_available, f"{count} blocks asked for, {self.num_available} available"
        blocks = []
        for _ in range(count):
            if not self._free:
                self._forget(self._nodes[next(iter(self._cached))])
            block = self._free.pop()
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each block of a table, last block first."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} is released more often than it was taken"
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._nodes:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def register(self, block: int, parent: PrefixNode, tokens: tuple[int, ...]) -> PrefixNode:
        """Index a held block, now full and computed, as `tokens` below `parent`; return the node to continue from.

        Another block may stand for the same prefix already: then that one's node is returned and `block` stays out of
        the index. A parent that has left the index is returned as it is: what follows it cannot be found either.
        """
        assert self._references[block] > 0 and block not in self._nodes, f"block {block} cannot be registered"
        assert len(tokens) == self.block_size, f"a block has {self.block_size} tokens, not {len(tokens)}"
        left_index = parent is not self.root and parent.block is None
        if left_index or not self.enable_prefix_caching:
            return parent
        node = parent.children.get(tokens)
        if node is None:
            node = parent.children[tokens] = self._nodes[block] = PrefixNode(parent, tokens, block)
        return node

    def is_indexed(self, block: int) -> bool:
        return block in self._nodes

    def num_references(self, block: int) -> int:
        return self._references[block]

    def clear_cache(self) -> None:
        """Empty the index: cached blocks become free, used ones will when they are released."""
        for node in list(self.root.children.values()):
            self._forget(node)

    def _forget(self, node: PrefixNode) -> None:
        """Take a node and everything below it out of the index."""
        assert node.parent is not None, "the root stays"
        del node.parent.children[node.tokens]
        for lost in _subtree(node):
            assert lost.block is not None, "a node in the tree has no block"
            del self._nodes[lost.block]
            if lost.block in self._cached:
                del self._cached[lost.block]
                self._free.append(lost.block)
            lost.block = None

    def check_integrity(self, tables: Iterable[Sequence[int] | array[int]]) -> None:
        """Assert free + cached + used = total and every other invariant; `tables` are all the holders' block tables."""
        free, cached = set(self._free), set(self._cached)
        used = {block for block, count in enumerate(self._references) if count}
        assert len(free) == len(self._free), "a block is free twice"
        assert len(free) + len(cached) + len(used) == self.num_blocks, "free + cached + used differs from the total"
        assert free | cached | used == set(range(self.num_blocks)), "a block is in no set, or in two"
        held = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), "a table holds a block twice"
            for block in table:
                held[block] += 1
        assert held == self._references, "reference counts differ from the tables"
        assert cached <= self._nodes.keys() <= cached | used, "a cached block is not indexed, or a free one is"
        nodes = [node for child in self.root.children.values() for node in _subtree(child)]
        assert len(nodes) == len(self._nodes), "the tree and the index by block differ"
        for node in nodes:
            assert node.block is not None and self._nodes[node.block] is node, "a node has lost its block"
            assert node.parent is not None and node.parent.children[node.tokens] is node, "a node has lost its parent"


def _subtree(node: PrefixNode) -> Iterator[PrefixNode]:
    """The node and all below it, parents first, without recursion: prefixes are thousands of blocks deep."""
    pending = [node]
    while pending:
        node = pending.pop()
        yield node
        pending.extend(node.children.values())
