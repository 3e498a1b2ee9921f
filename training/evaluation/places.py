"""What an evaluation leaves in the run folder, by name."""

from hone.manifest import EVALUATION_FILE as EVALUATION_FILE
from hone.manifest import PLOTS as PLOTS
from hone.manifest import REPORT_FILE as REPORT_FILE
from hone.manifest import VERDICT_FILE as VERDICT_FILE

PREDICTIONS_FILE = "predictions.parquet"
PROGRESS_FILE = "evaluating.json"
"""There while it is going on."""
REPORTED = (EVALUATION_FILE, VERDICT_FILE, REPORT_FILE)
"""What is published beside the weights, and the plots. Predictions stay with the run."""
NOT_EVALUATED = 3
"""What `training.check` exits with where an export is good and no report could be made of it."""
