"""python with_scale.py ARGUMENTS: `dscompress` with one stage kind more, which takes one row."""

from compress.cli import main
from compress.stages import KINDS, Kind

KINDS["scale"] = Kind("scale_stage.plan:ScaleStage", "scale_stage")

if __name__ == "__main__":
    main()
