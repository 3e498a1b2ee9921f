"""What a model is tuned to do: one small file a task, listed here."""

from training.tasks.chat import Chat
from training.tasks.task import Batch, Encoded, Task
from training.tasks.text_classification import TextClassification

TASKS: dict[str, Task] = {task.name: task for task in (Chat(), TextClassification())}

__all__ = ["TASKS", "Batch", "Encoded", "Task"]
