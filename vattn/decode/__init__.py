"""One captured step for every batch of its size, and the loop that runs it."""

from .loop import DecodeLoop
from .state import DecodedToken, DecodeModel, Sampling, Start

__all__ = ["DecodeLoop", "DecodeModel", "DecodedToken", "Sampling", "Start"]
