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
    body: str
    """What is sent there beside the name of the model, for instance; FILE is a file in base64."""
    metrics: tuple[str, ...]
    """What validation measures beside the loss."""


CAUSAL = "causal language model"
MESSAGES, PROMPT, TEXT = '"messages": [{"role": "user", "content": "..."}]', '"prompt": "..."', '"input": "..."'
TASKS: dict[TaskName, TaskFacts] = {
    "chat": TaskFacts("answers in a conversation", "chat", CAUSAL, "/v1/chat/completions", MESSAGES, ("token_accuracy",)),
    "completion": TaskFacts("goes on with a text", "text", CAUSAL, "/v1/completions", PROMPT, ("token_accuracy",)),
    "preference": TaskFacts(
        "answers as people prefer (DPO)", "preference", CAUSAL, "/v1/chat/completions", MESSAGES, ("reward_accuracy", "reward_margin")
    ),
    "text-classification": TaskFacts(
        "names the class, any number of classes, or a number, of a text",
        "labelled-text",
        "encoder or causal language model",
        "/v1/classify",
        TEXT,
        ("accuracy", "mean_absolute_error"),
    ),
    "token-classification": TaskFacts("names the class of each word", "token-labels", "encoder", "/v1/classify", TEXT, ("token_accuracy",)),
    "seq2seq": TaskFacts("writes one text from another", "pair", "encoder-decoder", "/v1/completions", PROMPT, ("token_accuracy",)),
    "image-classification": TaskFacts(
        "names the class, any number of classes, or a number, of a picture",
        "image",
        "vision encoder",
        "/v1/classify",
        '"input": {"image": "FILE"}',
        ("accuracy", "mean_absolute_error"),
    ),
    "audio-classification": TaskFacts(
        "names the class, any number of classes, or a number, of a sound",
        "audio",
        "audio encoder",
        "/v1/classify",
        '"input": {"audio": "FILE"}',
        ("accuracy", "mean_absolute_error"),
    ),
}
assert tuple(TASKS) == get_args(TaskName)


def curl(task: TaskName, model: str, *, url: str) -> str:
    """A shell command that calls a served model of this task."""
    facts = TASKS[task]
    body = f'{{"model": "{model}", {facts.body}}}'
    call = f"curl {url}{facts.route} -H 'content-type: application/json'"
    if "FILE" not in body:
        return f"{call} -d '{body}'"
    # Through a pipe: a command line holds no more than 128 KiB of one argument.
    return f"printf '{body.replace('FILE', '%s')}' \"$(base64 < FILE | tr -d '\\n')\" | {call} -d @-"
