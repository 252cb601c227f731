"""Which replica of a Ray cluster a request goes to: the one that has the prompt's beginning stored."""

from __future__ import annotations

import hashlib
import random

from pydantic_core import from_json, to_json
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

__all__ = ["PrefixRouter", "prefix_of"]

_CHARACTERS = 1024  # of a prompt: some 250 tokens, and fewer are soon computed


def prefix_of(body: bytes) -> bytes:
    """How the prompt of a request begins, after the salt that keeps its stored rows apart.

    Nothing where there is no prompt, or the body is wrong, which the replica tells the client.
    """
    try:
        asked = from_json(body)
    except ValueError:
        return b""
    prompt = asked.get("messages") or asked.get("prompt") if isinstance(asked, dict) else None
    if not prompt:
        return b""
    return to_json([asked.get("cache_salt") or asked.get("user"), to_json(prompt).decode()[:_CHARACTERS]])


class PrefixRouter(RequestRouter):
    """The replica that the prompt's beginning belongs to, while that takes requests; else the less busy of two.

    Each router ranks replicas by a hash of beginning and replica. So all agree without talking to each other, and where
    a replica comes or goes, only those prompts move that it gets or had.

    Ray copies this class by value to each process that sends requests. So it reads the call's ``prefix``, which is
    bytes, and no class of this package.
    """

    # Ray's tenth of a second is short for a replica whose cores all compute; it would lose its prompts to another one.
    queue_len_response_deadline_s = 2.0

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas; Ray takes the least busy of the first rank in which one takes requests."""
        rest, ranks, prefix = list(candidate_replicas), [], b""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # where all are full, wait before asking again
            prefix = pending_request.kwargs.get("prefix", b"")
        if prefix and rest:
            owner = max(rest, key=lambda replica: _weight(prefix, replica.replica_id.unique_id))
            rest.remove(owner)
            ranks.append([owner])
        return [*ranks, random.sample(rest, min(2, len(rest)))]


def _weight(prefix: bytes, replica: str) -> bytes:
    return hashlib.blake2b(replica.encode() + b"\0" + prefix).digest()
