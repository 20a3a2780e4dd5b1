"""python with_scale.py ARGUMENTS: `dscompress` with one stage kind more, which takes one row."""

import sys

from compress.stages import KINDS, Kind

KINDS["scale"] = Kind("scale_stage.plan:ScaleStage", "scale_stage")


def main() -> None:
    from compress import cli

    if "run" in sys.argv and "--dry-run" not in sys.argv:
        from stock_here import asked_here

        from compress.evaluation import base, verify

        base.asked = verify.asked = asked_here  # the stock loader in this process: it starts at once
    cli.main()


if __name__ == "__main__":
    main()
