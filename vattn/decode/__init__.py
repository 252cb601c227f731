"""One captured step for every batch of its size, and the loop that runs it."""

from .loop import DecodedToken, DecodeLoop, DecodeModel, Sampling

__all__ = ["DecodeLoop", "DecodeModel", "DecodedToken", "Sampling"]
