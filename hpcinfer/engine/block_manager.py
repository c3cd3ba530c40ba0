"""KV blocks: who holds which, how many share one, which prefixes can be reused. Integers only.

Every block is in exactly one state:  held (references >= 1)  |  free (references 0, in `_free`)
A free block keeps its hash until it is handed out again, so that a later sequence with the same prefix
finds it. Blocks are handed out oldest first. Full blocks that a sequence has still to compute are announced, so that
others with the same prefix can wait for them.
"""

from array import array
from collections import OrderedDict
from hashlib import blake2b

from hpcinfer.engine.sequence import Sequence


class BlockManager:
    """Hands out KV blocks of `block_size` tokens; the same decisions on every rank of a replica."""

    def __init__(self, num_blocks: int, block_size: int, *, reuse: bool = True) -> None:
        self.num_blocks, self.block_size, self._reuse = num_blocks, block_size, reuse
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(num_blocks))
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._announced: dict[bytes, int] = {}  # by whom (seq_id)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence blocks for its first `num_tokens` tokens; none, and false, where too few are free."""
        num_missing = -(-num_tokens // self.block_size) - len(sequence.blocks)
        if num_missing > len(self._free):
            return False
        for _ in range(num_missing):
            block, _none = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            sequence.blocks.append(block)
        return True

    def reuse_prefix(self, sequence: Sequence) -> None:
        """Give a sequence without blocks those that hold its prefix; its last token is always left to compute."""
        assert not sequence.blocks, f"{sequence = } already holds blocks"
        for index in range(self._num_sharable(sequence)):
            block = self._block_of.get(self._hash(sequence, index))
            if block is None:
                break
            self._free.pop(block, None)
            self._references[block] += 1
            sequence.blocks.append(block)
        sequence.num_remembered = len(sequence.blocks)
        sequence.num_computed = sequence.num_scheduled = len(sequence.blocks) * self.block_size

    def announce(self, sequence: Sequence) -> None:
        """Say that the sequence is going to compute all its tokens; holds until it has, or is released."""
        if self._reuse:
            for index in range(sequence.num_remembered, len(sequence.token_ids) // self.block_size):
                self._announced.setdefault(self._hash(sequence, index), sequence.seq_id)

    def is_coming(self, sequence: Sequence) -> bool:
        """Whether the first block of a sequence that cannot be shared yet is announced by another one."""
        if self._announced:
            for index in range(self._num_sharable(sequence)):
                digest = self._hash(sequence, index)
                if digest not in self._block_of:
                    return digest in self._announced
        return False

    def remember(self, sequence: Sequence) -> None:
        """Offer the blocks that the sequence has filled for reuse."""
        num_full = sequence.num_computed // self.block_size
        if not self._reuse or num_full == sequence.num_remembered:
            return
        for index in range(sequence.num_remembered, num_full):
            block, digest = sequence.blocks[index], self._hash(sequence, index)
            self._withdraw(sequence, digest)
            if digest not in self._block_of:
                self._hash_of[block], self._block_of[digest] = digest, block
        sequence.num_remembered = num_full

    def release(self, sequence: Sequence) -> None:
        """Take all blocks back, last ones first, so that prefixes stay longest.

        A device may still have to write to the last one, of a token behind the end: whoever gets it next writes later.
        """
        for block in reversed(sequence.blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
        for digest in sequence.block_hashes[sequence.num_remembered :]:
            self._withdraw(sequence, digest)
        del sequence.blocks[:]
        sequence.num_computed = sequence.num_scheduled = sequence.num_remembered = 0

    def check_integrity(self) -> None:
        """Assert that every block is either held or free, once."""
        for block, references in enumerate(self._references):
            assert references >= 0, f"{block = } {references = }"
            assert (references == 0) == (block in self._free), f"{block = } {references = }"

    def _num_sharable(self, sequence: Sequence) -> int:
        """Blocks that a sequence may share: the full ones before its last token."""
        return (len(sequence.token_ids) - 1) // self.block_size if self._reuse else 0

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        """Hash of a block's tokens and of all before them."""
        hashes = sequence.block_hashes
        while len(hashes) <= index:
            start = len(hashes) * self.block_size
            ids = array("i", sequence.token_ids[start : start + self.block_size]).tobytes()
            hashes.append(blake2b((hashes[-1] if hashes else b"") + ids, digest_size=16).digest())
        return hashes[index]

    def _withdraw(self, sequence: Sequence, digest: bytes) -> None:
        if self._announced.get(digest) == sequence.seq_id:
            del self._announced[digest]

    def _forget(self, block: int) -> None:
        digest = self._hash_of[block]
        if digest is not None:
            del self._block_of[digest]
            self._hash_of[block] = None
