"""CUDA graphs of anyone's module: what keeps a forward from being captured, and graphs of those that nothing keeps.

The idea is PyGraph's (arXiv 2503.19779): most forwards that cannot be captured fail for a small reason, such as a mask
that is made on the CPU in every call.
"""

from .capturable import Capturable, make_capturable
from .report import Finding, Report, Signature

__all__ = ["Capturable", "Finding", "Report", "Signature", "make_capturable"]
