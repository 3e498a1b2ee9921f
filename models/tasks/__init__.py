"""What a model is tuned to do: one small file a task, listed here. What users see of them is in hone.tasks."""

from models.tasks.audio_classification import AudioClassification
from models.tasks.chat import Chat
from models.tasks.completion import Completion
from models.tasks.image_classification import ImageClassification
from models.tasks.preference import Preference
from models.tasks.seq2seq import Seq2Seq
from models.tasks.task import Batch, Encoded, Head, Inputs, LossOptions, Task, inputs_by
from models.tasks.text_classification import TextClassification
from models.tasks.token_classification import TokenClassification

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Chat(),
        Completion(),
        Preference(),
        TextClassification(),
        TokenClassification(),
        Seq2Seq(),
        ImageClassification(),
        AudioClassification(),
    )
}

__all__ = ["TASKS", "Batch", "Encoded", "Head", "Inputs", "LossOptions", "Task", "inputs_by"]
