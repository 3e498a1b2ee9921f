"""What a model can be tuned to do, as a recipe names it: the facts that a user sees. What is done is in `models/tasks`, a file each."""

from dataclasses import dataclass
from typing import Literal, get_args

TaskName = Literal[
    "chat",
    "completion",
    "preference",
    "text-classification",
    "token-classification",
    "seq2seq",
    "image-classification",
    "audio-classification",
]


@dataclass(frozen=True)
class TaskFacts:
    """One task."""

    says: str
    shape: str
    """The shape of row that it learns from; see hone.data.formats."""
    base: str
    """What kind of base it needs."""
    route: str
    """Where it is called once it is served."""
    metrics: tuple[str, ...]
    """What validation measures beside the loss."""


CAUSAL = "causal language model"
TASKS: dict[TaskName, TaskFacts] = {
    "chat": TaskFacts("answers in a conversation", "chat", CAUSAL, "/v1/chat/completions", ("token_accuracy",)),
    "completion": TaskFacts("goes on with a text", "text", CAUSAL, "/v1/completions", ("token_accuracy",)),
    "preference": TaskFacts(
        "answers as people prefer (DPO)", "preference", CAUSAL, "/v1/chat/completions", ("reward_accuracy", "reward_margin")
    ),
    "text-classification": TaskFacts(
        "names the class, any number of classes, or a number, of a text",
        "labelled-text",
        "encoder or causal language model",
        "/v1/classify",
        ("accuracy", "mean_absolute_error"),
    ),
    "token-classification": TaskFacts("names the class of each word", "token-labels", "encoder", "/v1/classify", ("token_accuracy",)),
    "seq2seq": TaskFacts("writes one text from another", "pair", "encoder-decoder", "/v1/completions", ("token_accuracy",)),
    "image-classification": TaskFacts(
        "names the class, any number of classes, or a number, of a picture",
        "image",
        "vision encoder",
        "/v1/classify",
        ("accuracy", "mean_absolute_error"),
    ),
    "audio-classification": TaskFacts(
        "names the class, any number of classes, or a number, of a sound",
        "audio",
        "audio encoder",
        "/v1/classify",
        ("accuracy", "mean_absolute_error"),
    ),
}
assert tuple(TASKS) == get_args(TaskName)
