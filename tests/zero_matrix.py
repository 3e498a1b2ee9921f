"""`python -m tests.zero_matrix FOLDER`: one of two workers that train every case in FOLDER/cases.json, one after another.

A run of Ray Train for each case would take minutes to start in all; what is tried here is the loop under DeepSpeed.
"""

import gc
import json
import sys
import traceback
from pathlib import Path

from training.job import Job
from training.loop import train
from training.worker import TorchrunWorker


def main() -> None:
    """Train each case; a file `rank-N.json` in its folder says how it ended."""
    worker = TorchrunWorker()
    for case in json.loads((Path(sys.argv[1]) / "cases.json").read_text()):
        folder = Path(case)
        said = ""
        try:
            train(Job.load(folder), worker)
        except Exception:
            said = traceback.format_exc()
        (folder / f"rank-{worker.rank}.json").write_text(json.dumps(said))
        gc.collect()


if __name__ == "__main__":
    main()
