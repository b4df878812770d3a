"""From a checkpoint to a verified bundle.

The steps: write the program, run it once in torch (this gives reference results, examples
and activation ranges), lower each segment in worker processes or take it from the cache,
run the program again with the artifacts, and pack. A second export of the same thing finds
its record in the cache and only packs.
"""

from handheld_export.export.plan import Options, plan_segments
from handheld_export.export.run import export
from handheld_export.export.runners import Runners
from handheld_export.export.workers import Progress

__all__ = ["Options", "Progress", "Runners", "export", "plan_segments"]
