"""What a KVCache is made of: pages, addresses, who has which page, and when a page may go.

How ``KVCache.ensure`` comes to a driver call, each step in the file that it is named after:

1. ``lock``: one thread at a time, with signals put off.
2. ``slots``: plan; where pages are short, make room and plan again; carry the plan out, all of it or none.
3. ``planner``: which pages are missing, shared, or parked in the slot already; what it finds is one of the ``plans``.
4. ``page_table``: takes pages from the pool (``pages``), and scrubs and copies.
5. ``reservation``: calls the driver, and registers beside each call how to take it back (``undo``).

Beside that way: ``stored`` is what happens to a slot between two sequences, ``parking`` keeps what released sequences
left mapped, ``guard`` makes shared pages read-only if asked, ``work`` knows which work on the GPU may still touch a
page, ``steps`` enters and leaves the launches of such work, ``slot_states`` checks what callers say of slots,
``opened`` whether the cache may be used, and ``backing`` owns it all and ends it.
"""
