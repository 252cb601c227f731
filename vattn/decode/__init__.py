"""One captured step for every batch of its size, and the loop that runs it."""

from .loop import DecodeLoop
from .state import Compute, DecodedToken, DecodeModel, OffersWays, Sampling, Start

__all__ = ["Compute", "DecodeLoop", "DecodeModel", "DecodedToken", "OffersWays", "Sampling", "Start"]
