"""Prompts that were read before: keys and values of their beginnings, so that a new row reads only what is new.

Kept in blocks of `BLOCK` tokens, in a tree: a block is found by its adapter's digest and by every token up to its end, compared one by one
and not by a hash, so rows of different adapters or of different beginnings cannot share one. Blocks are copied into a row's slot and out
of it, between two forward passes on the model's thread. So no running row holds one, and the oldest may be dropped at any time; nobody
counts who uses what.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from serving.engine.cache import BlockStore, SlotCache

logger = logging.getLogger("ray.serve")

BLOCK = 16
"""Tokens of one block."""

Tokens = tuple[int, ...]


@dataclass(eq=False)
class _Node:
    """A block, after those of its parents."""

    tokens: Tokens
    parent: "_Node | None"
    place: int
    """Where in the store it is."""
    children: "dict[Tokens, _Node]" = field(default_factory=dict)


class PrefixCache:
    """Blocks of any adapters, the ones used last."""

    def __init__(self, cache: SlotCache, *, max_tokens: int) -> None:
        """`max_tokens` bounds the memory; 0 keeps nothing."""
        self.hit_tokens = 0
        """Prompt tokens that did not have to be read, since the start."""
        self._cache = cache
        self._store = BlockStore(cache, block=BLOCK)
        self._max_blocks = max_tokens // BLOCK
        self._roots: dict[str, _Node] = {}
        """By digest; of a root only the children count."""
        self._used: OrderedDict[_Node, None] = OrderedDict()
        """Least recently used first. A block is always marked after its children, so the first is nobody's parent."""

    def __len__(self) -> int:
        return len(self._used)

    def keeps(self, key: str | None) -> bool:
        """Whether anything is kept under this key; there is no key for what has no digest."""
        return key is not None and self._max_blocks > 0

    def known(self, key: str | None, tokens: Sequence[int]) -> int:
        """How many tokens `load` would fill."""
        return len(self._path(key, tokens[:-1])) * BLOCK

    def load(self, key: str | None, tokens: Sequence[int], *, slot: int) -> int:
        """Fill a slot with the longest beginning of `tokens` that is here; return how many tokens that is, always fewer than all."""
        path = self._path(key, tokens[:-1])
        if not path:
            return 0
        self._mark(path)
        self._store.load([node.place for node in path], slot=slot)
        self.hit_tokens += len(path) * BLOCK
        return len(path) * BLOCK

    def save(self, key: str | None, tokens: Sequence[int], *, slot: int) -> None:
        """Keep the whole blocks of `tokens`, whose keys and values are in a slot."""
        if key is None or not self._max_blocks:
            return
        path = self._path(key, tokens)
        known = len(path)
        self._mark(path)  # before there is room made for the others, so that it is not theirs
        blocks = list(_blocks(tokens))[known : self._max_blocks]
        if not blocks:
            return
        root = self._roots.setdefault(key, _Node((), None, -1))
        parent = path[-1] if path else root
        for block in blocks:
            place = self._room()
            parent.children[block] = _Node(block, parent, place)
            parent = parent.children[block]
            self._used[parent] = None
            path.append(parent)
        self._mark(path)
        try:
            self._store.save([node.place for node in path[known:]], slot=slot, first=known)
        except RuntimeError:  # no memory for more: what the tree promises must be there, so it starts anew
            logger.warning("no memory for %d blocks of earlier prompts; all %d are dropped", len(path) - known, len(self._used))
            self._roots, self._used = {}, OrderedDict()
            self._store = BlockStore(self._cache, block=BLOCK)
        if len(self._used) == self._max_blocks:  # others may have lost their last block
            self._roots = {digest: root for digest, root in self._roots.items() if root.children}

    def _path(self, key: str | None, tokens: Sequence[int]) -> list[_Node]:
        """The blocks that `tokens` begin with."""
        path: list[_Node] = []
        node = None if key is None else self._roots.get(key)
        for block in _blocks(tokens):
            node = node and node.children.get(block)
            if node is None:
                break
            path.append(node)
        return path

    def _mark(self, path: Sequence[_Node]) -> None:
        for node in reversed(path):
            self._used[node] = None
            self._used.move_to_end(node)

    def _room(self) -> int:
        """A free place, or that of the block that was not used for longest."""
        if len(self._used) < self._max_blocks:
            return len(self._used)
        oldest, _ = self._used.popitem(last=False)
        assert oldest.parent is not None
        assert not oldest.children
        del oldest.parent.children[oldest.tokens]
        return oldest.place


def _blocks(tokens: Sequence[int]) -> Iterator[Tokens]:
    return (tuple(tokens[at : at + BLOCK]) for at in range(0, len(tokens) - BLOCK + 1, BLOCK))
