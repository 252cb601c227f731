"""One captured step for every batch of its size, and the loop that runs it."""

from .loop import DecodeLoop
from .state import Compute, DecodedToken, DecodeModel, Sampling, Start
from .ways import OffersWays

__all__ = ["Compute", "DecodeLoop", "DecodeModel", "DecodedToken", "OffersWays", "Sampling", "Start"]
