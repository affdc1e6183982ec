"""Which page holds which tokens of which sequence: bookkeeping that all layers of a model share.

Position p of a sequence is row p % page of its logical page p // page. Logical pages live in one of two pools: the
oldest ones in the store (quantized), the youngest in the tail. Reference counts say how many sequences hold a page, so
that a common prefix is kept once. Every function is pure and works under jit: what cannot be granted is recorded in
`Pages.failed`, which `check` raises for.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int


class CacheError(ValueError):
    """A cache that was asked for what it cannot do: more tokens than it has pages for, a rollback into the store."""


@struct.dataclass
class Pages:
    """Page tables of `batch` sequences.

    Positions evicted..stored-1 of a sequence are in the store, stored..lengths-1 in the tail; both limits are multiples
    of `page`. Logical page i is found at column i % slots of the table of its pool; other entries mean nothing.
    users: how many sequences hold a page of the pool; 0 is free. failed: this sequence was refused something, and is
    not to be trusted until it is released.
    """

    lengths: Int[Array, "batch"]
    stored: Int[Array, "batch"]
    evicted: Int[Array, "batch"]
    tail_table: Int[Array, "batch tail_slots"]
    store_table: Int[Array, "batch store_slots"]
    tail_users: Int[Array, "tail_pages"]
    store_users: Int[Array, "store_pages"]
    failed: Bool[Array, "batch"]
    page: int = struct.field(pytree_node=False)


@struct.dataclass
class Reservation:
    """Room for the next tokens: `counts` of them from position `start` on (0 where the sequence was refused). Before
    they are written, the tail page `source` is copied to `target`; a target past the pool means that nothing is."""

    start: Int[Array, "batch"]
    counts: Int[Array, "batch"]
    source: Int[Array, "batch"]
    target: Int[Array, "batch"]


@struct.dataclass
class Migration:
    """At most one page a sequence on its way from tail page `source` to store page `target`; a target past the pool
    means that the sequence moves nothing."""

    source: Int[Array, "batch"]
    target: Int[Array, "batch"]


def empty_pages(
    batch: int,
    *,
    page: int = 64,
    tail_slots: int,
    store_slots: int = 0,
    tail_pages: int | None = None,
    store_pages: int | None = None,
) -> Pages:
    """Tables of `batch` empty sequences, each of at most `tail_slots` pages in the tail and `store_slots` in the store.

    A pool has as many pages as all sequences could fill unless a smaller `tail_pages` or `store_pages` is given. Raises
    CacheError for a page that is not a positive even number of tokens (two int4 codes share a byte) or sizes below 0.
    """
    if page < 2 or page % 2:
        raise CacheError(f"a page of {page} tokens: it must be a positive even number")
    if tail_slots < 1 or store_slots < 0:
        raise CacheError(f"tail_slots={tail_slots} must be at least 1, store_slots={store_slots} at least 0")
    tail_pages = batch * tail_slots if tail_pages is None else tail_pages
    store_pages = batch * store_slots if store_pages is None else store_pages
    if tail_pages < min(batch, 1) or store_pages < 0:
        raise CacheError(f"tail_pages={tail_pages} must be at least 1, store_pages={store_pages} at least 0")

    def zeros(*shape: int) -> jax.Array:
        return jnp.zeros(shape, jnp.int32)

    return Pages(
        lengths=zeros(batch),
        stored=zeros(batch),
        evicted=zeros(batch),
        tail_table=zeros(batch, tail_slots),
        store_table=zeros(batch, store_slots),
        tail_users=zeros(tail_pages),
        store_users=zeros(store_pages),
        failed=jnp.zeros(batch, bool),
        page=page,
    )


def check(pages: Pages) -> None:
    """Raise CacheError if a sequence was refused something. Reads device memory, so call it outside of jit."""
    failed = [int(b) for b in jnp.flatnonzero(pages.failed)]
    if failed:
        raise CacheError(
            f"sequences {failed}: no free page for an append, or a rollback past the tail; release them, or build the "
            "cache with more pages"
        )


def reserve(pages: Pages, counts: Int[Array, "batch"], most: int) -> tuple[Pages, Reservation]:
    """Make each sequence `counts` tokens longer, by at most `most`, which fixes the shapes.

    Takes free tail pages where the present one does not suffice. A page that others hold too is never written: where
    the next token would fall into one, the sequence gets a page of its own (copy on write). A sequence whose tokens do
    not fit into its `tail_slots`, or for which the pool has no page left, keeps its length and is marked failed.
    """
    page, slots, pool = pages.page, pages.tail_table.shape[1], pages.tail_users.shape[0]
    counts = jnp.clip(counts, 0, most)
    first = pages.lengths // page
    logical = first[:, None] + jnp.arange((max(most, 1) + page - 2) // page + 1)[None, :]
    touched = (logical * page < (pages.lengths + counts)[:, None]) & (counts > 0)[:, None]
    begun = logical * page < pages.lengths[:, None]
    present = _column(pages.tail_table, first % slots)
    shared = begun & touched & (pages.tail_users[present] > 1)[:, None]
    fits = jnp.all(~touched | (logical - (pages.stored // page)[:, None] < slots), axis=1)
    wanted = touched & (~begun | shared) & fits[:, None]
    ids, granted = _claim(pages.tail_users, wanted)
    ok = fits & jnp.all(granted | ~wanted, axis=1)
    wanted, copied = wanted & ok[:, None], shared[:, 0] & ok
    users = _count(pages.tail_users, ids, wanted, 1)
    users = _count(users, present, copied, -1)
    rows = jnp.arange(first.shape[0])[:, None]
    table = pages.tail_table.at[rows, jnp.where(wanted, logical % slots, slots)].set(ids, mode="drop")
    granted_counts = jnp.where(ok, counts, 0)
    reservation = Reservation(pages.lengths, granted_counts, present, jnp.where(copied, ids[:, 0], pool))
    grown = pages.replace(
        lengths=pages.lengths + granted_counts, tail_table=table, tail_users=users, failed=pages.failed | ~ok
    )
    return grown, reservation


def plan_migration(
    pages: Pages, settled: Int[Array, "batch"] | None = None, *, keep: int = 0
) -> tuple[Pages, Migration]:
    """Move the oldest tail page of each sequence to the store, where that page is full, lies wholly below `settled`
    (None: the length) and leaves at least `keep` tokens in the tail.

    `settled` is how many tokens of a sequence are final. Drafted tokens that are not verified yet lie above it, so they
    are still in the tail when they are rolled back. A sequence whose store is full stays as it is.
    """
    page, slots, pool = pages.page, pages.store_table.shape[1], pages.store_users.shape[0]
    source = _column(pages.tail_table, (pages.stored // page) % pages.tail_table.shape[1])
    if slots == 0 or pool == 0:
        return pages, Migration(source, jnp.full_like(source, pool))
    ready = _ready(pages, settled, keep)
    ids, moved = _claim(pages.store_users, ready)
    rows = jnp.arange(source.shape[0])
    column = jnp.where(moved, (pages.stored // page) % slots, slots)
    after = pages.replace(
        stored=pages.stored + jnp.where(moved, page, 0),
        store_table=pages.store_table.at[rows, column].set(ids, mode="drop"),
        store_users=_count(pages.store_users, ids, moved, 1),
        tail_users=_count(pages.tail_users, source, moved, -1),
    )
    return after, Migration(source, jnp.where(moved, ids, pool))


def can_migrate(pages: Pages, settled: Int[Array, "batch"] | None = None, *, keep: int = 0) -> Bool[Array, ""]:
    """Whether `plan_migration` would move anything."""
    if pages.store_users.shape[0] == 0:
        return jnp.zeros((), bool)
    return jnp.any(_ready(pages, settled, keep)) & jnp.any(pages.store_users == 0)


def rollback(pages: Pages, lengths: Int[Array, "batch"]) -> Pages:
    """Forget the tokens from `lengths` on; a sequence that is not longer than that stays as it is.

    Only tables change: neither tier is read, and what was written past the new end is written over. A length inside the
    store is refused: the sequence is cut at the first position of its tail and marked failed.
    """
    kept = jnp.minimum(jnp.maximum(lengths, pages.stored), pages.lengths)
    logical = _logical(pages.tail_table, pages.stored // pages.page) * pages.page
    freed = (logical >= kept[:, None]) & (logical < pages.lengths[:, None])
    return pages.replace(
        lengths=kept,
        tail_users=_count(pages.tail_users, pages.tail_table, freed, -1),
        failed=pages.failed | (lengths < pages.stored),
    )


def evict(pages: Pages, most: int) -> Pages:
    """Drop the oldest pages of the store until a sequence holds at most `most` tokens, or only its tail. The others
    keep their positions."""
    excess = -(-jnp.maximum(pages.lengths - pages.evicted - most, 0) // pages.page) * pages.page
    evicted = jnp.minimum(pages.evicted + excess, pages.stored)
    logical = _logical(pages.store_table, pages.evicted // pages.page) * pages.page
    freed = logical < evicted[:, None]
    return pages.replace(evicted=evicted, store_users=_count(pages.store_users, pages.store_table, freed, -1))


def release(pages: Pages, which: Bool[Array, "batch"]) -> Pages:
    """Empty the sequences `which`: their pages are free again where no other sequence holds them."""
    tail, store = _held(pages)
    return pages.replace(
        lengths=jnp.where(which, 0, pages.lengths),
        stored=jnp.where(which, 0, pages.stored),
        evicted=jnp.where(which, 0, pages.evicted),
        tail_users=_count(pages.tail_users, pages.tail_table, tail & which[:, None], -1),
        store_users=_count(pages.store_users, pages.store_table, store & which[:, None], -1),
        failed=pages.failed & ~which,
    )


def share(
    pages: Pages, source: Int[Array, ""] | int, target: Int[Array, ""] | int, length: Int[Array, ""] | int
) -> Pages:
    """Give sequence `target`, which is released first, the first `length` tokens of another sequence `source`.

    No key or value is copied: both hold the same pages, and `reserve` gives the first that writes into a common one a
    page of its own. Where `length` ends inside the store it is rounded down to whole pages, because a page of the store
    cannot be continued; `Pages.lengths` says what was taken. A sequence that has lost its beginning to `evict` gives
    nothing up to there.
    """
    page, rows = pages.page, jnp.arange(pages.lengths.shape[0])
    pages = release(pages, rows == target)
    stored, evicted = pages.stored[source], pages.evicted[source]
    length = jnp.minimum(length, pages.lengths[source])
    length = jnp.where(length < stored, length // page * page, length)
    length = jnp.where(length > evicted, length, 0)
    tail, store = _held(pages)
    tail = tail[source] & (_logical(pages.tail_table, pages.stored // page)[source] * page < length)
    store = store[source] & (_logical(pages.store_table, pages.evicted // page)[source] * page < length)
    return pages.replace(
        lengths=pages.lengths.at[target].set(length),
        stored=pages.stored.at[target].set(jnp.minimum(stored, length)),
        evicted=pages.evicted.at[target].set(jnp.minimum(evicted, length)),
        tail_table=pages.tail_table.at[target].set(pages.tail_table[source]),
        store_table=pages.store_table.at[target].set(pages.store_table[source]),
        tail_users=_count(pages.tail_users, pages.tail_table[source], tail, 1),
        store_users=_count(pages.store_users, pages.store_table[source], store, 1),
    )


def _logical(table: jax.Array, first: jax.Array) -> jax.Array:
    """The logical page that each column of a table stands for, the first one held being `first`."""
    slots = table.shape[1]
    if slots == 0:
        return table
    return first[:, None] + (jnp.arange(slots)[None, :] - first[:, None]) % slots


def _held(pages: Pages) -> tuple[jax.Array, jax.Array]:
    """Which entries of both tables point at a page that the sequence holds."""
    tail = _logical(pages.tail_table, pages.stored // pages.page) * pages.page < pages.lengths[:, None]
    store = _logical(pages.store_table, pages.evicted // pages.page) * pages.page < pages.stored[:, None]
    return tail, store


def _ready(pages: Pages, settled: jax.Array | None, keep: int) -> jax.Array:
    end = pages.stored + pages.page
    final = pages.lengths if settled is None else jnp.minimum(settled, pages.lengths)
    room = pages.stored - pages.evicted < pages.store_table.shape[1] * pages.page
    return (end <= final) & (pages.lengths - end >= keep) & room


def _column(table: jax.Array, column: jax.Array) -> jax.Array:
    return jnp.take_along_axis(table, column[:, None], axis=1)[:, 0]


def _claim(users: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A free page for every True of `wanted`, in order, and which of them got one."""
    free = jnp.cumsum(users == 0)
    rank = jnp.cumsum(wanted.ravel()).reshape(wanted.shape)
    ids = jnp.searchsorted(free, rank, side="left")
    return jnp.minimum(ids, users.shape[0] - 1).astype(jnp.int32), wanted & (rank <= free[-1])


def _count(users: jax.Array, ids: jax.Array, which: jax.Array, change: int) -> jax.Array:
    return users.at[jnp.where(which, ids, users.shape[0])].add(change, mode="drop")
