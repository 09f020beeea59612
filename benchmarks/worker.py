"""The worker process of `benchmarks.isolate`: runs a job and appends what it does to a file of events."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .engine import DeviceLost
from .isolate import Job, run_here
from .timing import first_line

DEVICE_LOST = 86


def main(job_file: str, event_file: str) -> int:
    """Run the job in `job_file`; returns the exit code."""
    job, first = Job.from_json(Path(job_file).read_text())
    with Path(event_file).open("a") as events:

        def tell(event: dict[str, Any]) -> None:
            events.write(json.dumps(event) + "\n")
            events.flush()

        try:
            for _ in run_here(job, first, tell):
                pass  # the parent reads the rows from the file
        except DeviceLost as error:
            tell({"reason": f"the GPU was lost, {first_line(error.__cause__ or error)}"})
            return DEVICE_LOST
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
