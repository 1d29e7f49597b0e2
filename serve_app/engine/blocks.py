"""The KV pages of one replica: who holds them, which hold a prefix that may be read again, which are free.

A page is free, or idle (cached and held by nobody), or held (one reference for each sequence that reads it). Every
operation is O(1) per page. Prefix reuse follows vLLM's automatic prefix caching: a full page is known by a digest of
all tokens up to its end. The digest is cryptographic, so equal digests mean equal tokens, whoever chose the prompts.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b


def extend_chain(chain: list[bytes], tokens: list[int], page_tokens: int, num_pages: int) -> None:
    """Append digests to `chain` until it names the first `num_pages` full pages of `tokens`.

    Digest i stands for the tokens [0, (i + 1) * page_tokens).
    """
    for i in range(len(chain), num_pages):
        parent = chain[-1] if chain else b""
        content = array("q", tokens[i * page_tokens : (i + 1) * page_tokens]).tobytes()
        chain.append(blake2b(parent + content, digest_size=32).digest())


class PagePool:
    """Pages [0, num_pages) of one replica.

    The verbs close: what `allocate` and `hold` take, `release` gives back.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # longest unused first
        self._num_refs = [0] * num_pages
        self._digest_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could hand out now."""
        return len(self._free) + len(self._idle)

    @property
    def num_held(self) -> int:
        return self.num_pages - self.num_available

    def can_allocate(self, num_pages: int, beside: Sequence[int] = ()) -> bool:
        """Whether `num_pages` pages are to be had once the cached pages `beside` are held."""
        num_idle = sum(1 for page in beside if not self._num_refs[page])
        return num_pages + num_idle <= self.num_available

    def allocate(self, num_pages: int) -> list[int]:
        """Take pages of undefined content, one reference each; forgets the longest unused prefixes if it must."""
        assert num_pages <= self.num_available
        return [self._take() for _ in range(num_pages)]

    def match(self, chain: Sequence[bytes]) -> list[int]:
        """The cached pages of the longest known prefix of `chain`. Takes no reference."""
        pages: list[int] = []
        for digest in chain:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def hold(self, pages: Sequence[int]) -> None:
        """Add a reference to cached or held pages."""
        for page in pages:
            if not self._num_refs[page]:
                del self._idle[page]
            self._num_refs[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference each, the last page first: a prefix without its end is of use, an end alone is not."""
        for page in reversed(pages):
            assert self._num_refs[page] > 0
            self._num_refs[page] -= 1
            if self._num_refs[page]:
                continue
            if page in self._digest_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def publish(self, page: int, digest: bytes) -> None:
        """Offer a held page whose KV is computed for reuse. Of two equal pages the first stays the known one."""
        assert self._num_refs[page] > 0
        if digest not in self._page_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def num_refs(self, page: int) -> int:
        return self._num_refs[page]

    def check_integrity(self) -> None:
        """Assert that free + idle + held = all, and that the index names the pages that carry its digests."""
        free, idle = set(self._free), set(self._idle)
        held = {page for page, num_refs in enumerate(self._num_refs) if num_refs > 0}
        assert len(free) == len(self._free), "a page is free twice"
        assert min(self._num_refs, default=0) >= 0, "a page was released twice"
        assert len(free) + len(idle) + len(held) == self.num_pages, "a page is lost or in two states"
        assert free | idle | held == set(range(self.num_pages)), "a page is lost"
        assert idle <= set(self._digest_of), "an idle page has no digest"
        assert not free & set(self._digest_of), "a free page is still known by a digest"
        assert {page: digest for digest, page in self._page_of.items()} == self._digest_of, "the index is torn"

    def _take(self) -> int:
        page = self._free.pop() if self._free else self._evict()
        self._num_refs[page] = 1
        return page

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._digest_of.pop(page)]
        return page
