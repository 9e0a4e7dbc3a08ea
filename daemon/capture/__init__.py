"""Reading a live agent: `take_cut` gives everything an agent consists of as of one instant.

Capture knows nothing of bundles, destinations or the catalog. It changes no byte of the agent's files,
never blocks its writers beyond milliseconds, and keeps what it copies in a scratch directory that the
caller owns.
"""

from daemon.capture.collect import Capture, CapturedArtifact
from daemon.capture.cut import CutOptions, take_cut, take_cut_unless

__all__ = ["Capture", "CapturedArtifact", "CutOptions", "take_cut", "take_cut_unless"]
