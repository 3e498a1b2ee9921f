"""Which columns make which row. A format is recognised by the columns that are there; each makes rows of one shape.

| shape | row |
| --- | --- |
| chat | `messages`, and `tools` where there are some |
| text | `text` |
| labelled-text | `text` and one of `label`, `labels` (any number of classes), `number` |
| token-labels | `tokens` and as many `labels` |
| pair | `source`, `target` |
| preference | `prompt`, `chosen`, `rejected`, each a list of messages |
| image, audio | bytes or a path, and one of `label`, `labels`, `number` |
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hone.data.messages import conversation, exchange, from_sharegpt
from hone.data.values import checked_text, class_name, class_names, number
from hone.errors import DataError

Row = dict[str, Any]
ANSWERS = ("label", "labels", "number")
"""What a classifier may be asked for: one class, any number of classes, a number."""


@dataclass(frozen=True)
class Format:
    """One way in which rows are written."""

    name: str
    shape: str
    needs: tuple[str, ...]
    """Columns without which it is not this format."""
    convert: Callable[[Row], Row]


def recognise(columns: Collection[str], *, shape: str | None = None) -> Format | None:
    """The format of a row with these columns, of that shape if one is wanted."""
    present = set(columns)
    return next((f for f in FORMATS if present.issuperset(f.needs) and shape in (None, f.shape)), None)


def convert(row: Row, *, shape: str | None = None, columns: Mapping[str, str] | None = None) -> tuple[Row, Format]:
    """A raw row as a row of its shape.

    Args:
        row: Column -> value.
        shape: The shape that is wanted; by default whatever is recognised.
        columns: Our name of a column -> its name in the file, where they differ.

    Raises:
        DataError: no format has these columns, or a value is not as it should be.
    """
    named = dict(row)
    for ours, theirs in (columns or {}).items():
        if theirs not in row:
            raise DataError(f"no column {theirs!r} (there are: {_listed(row)}); data.columns says that it is the {ours!r}")
        named[ours] = row[theirs]
    # A null says that nothing stands there, as Parquet and Arrow give every column to every row.
    found = recognise([name for name, value in named.items() if value is not None], shape=shape)
    if found is None:
        raise DataError(_unrecognised(named, shape))
    return found.convert(named), found


def media_path(value: Any, folder: str, name: str) -> str:
    """The path of a picture or sound that a row names, which stays below the folder of the file that the row is in.

    Raises:
        DataError: it is no path, or it climbs out.
    """
    text = checked_text(value, name)
    path, inside = PurePosixPath(text), Path(folder, text)
    if "://" in text or text.startswith("data:"):
        raise DataError(f"{name!r} {text!r:.200} is an address, which is not fetched; use bytes, or a path below {folder}")
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{name!r} {text!r:.200} leads out of the folder of its file; use a path below {folder}")
    try:  # the folder of an object store has no root, and is nothing on this machine
        is_link_out = inside.is_absolute() and inside.exists() and not inside.resolve().is_relative_to(Path(folder).resolve())
    except OSError as error:
        raise DataError(f"{name!r} {text!r:.200} cannot be looked up ({error.strerror})") from None
    if is_link_out:
        raise DataError(f"{name!r} {text!r:.200} is a link that leads out of {folder}")
    return str(inside)


def _chat(row: Row) -> Row:
    made: Row = {"messages": conversation(row["messages"])}
    tools = row.get("tools")
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise DataError('"tools" must be a list of objects, as OpenAI writes them')
        made["tools"] = tools
    return made


def _alpaca(row: Row) -> Row:
    instruction, given = checked_text(row["instruction"], "instruction"), row.get("input")
    prompt = f"{instruction}\n\n{given}" if isinstance(given, str) and given.strip() else instruction
    return {"messages": exchange(prompt, row["output"], keys=("instruction", "output"), system=row.get("system"))}


def _exchange(prompt: str, answer: str) -> Callable[[Row], Row]:
    return lambda row: {"messages": exchange(row[prompt], row[answer], keys=(prompt, answer), system=row.get("system"))}


def _preference(row: Row) -> Row:
    """Chosen and rejected are texts after a prompt, or whole conversations that begin alike."""
    prompt, answers = row.get("prompt"), (row["chosen"], row["rejected"])
    if all(isinstance(answer, str) for answer in answers):
        if prompt is None:
            raise DataError('no "prompt"; a preference of two texts needs the prompt that they answer')
        opening = [{"role": "user", "content": checked_text(prompt, "prompt")}] if isinstance(prompt, str) else _opening(prompt)
        sides = [[{"role": "assistant", "content": checked_text(a, name)}] for a, name in zip(answers, ("chosen", "rejected"), strict=True)]
    else:
        chosen, rejected = (conversation(answer, name) for answer, name in zip(answers, ("chosen", "rejected"), strict=True))
        shared = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
        if prompt is None:
            opening, sides = chosen[:shared], [chosen[shared:], rejected[shared:]]
        else:
            opening = [{"role": "user", "content": checked_text(prompt, "prompt")}] if isinstance(prompt, str) else _opening(prompt)
            sides = [side[len(opening) :] if side[: len(opening)] == opening else side for side in (chosen, rejected)]
    if sides[0] == sides[1]:
        raise DataError("chosen and rejected are the same, so there is nothing to prefer")
    if not opening or not all(sides):
        raise DataError("chosen and rejected must each answer a prompt that they share")
    return {"prompt": opening, "chosen": sides[0], "rejected": sides[1]}


def _opening(prompt: Any) -> list[Row]:
    return conversation(prompt, "prompt", needs_target=False)


def _tokens(row: Row) -> Row:
    tokens, labels = row["tokens"], row["labels"]
    if not isinstance(tokens, list) or not isinstance(labels, list) or not tokens:
        raise DataError('"tokens" and "labels" must be lists, and not empty')
    if len(tokens) != len(labels):
        raise DataError(f"{len(tokens)} tokens and {len(labels)} labels; each token needs one")
    return {
        "tokens": [checked_text(token, f"tokens[{n}]") for n, token in enumerate(tokens)],
        "labels": [class_name(label, f"labels[{n}]") for n, label in enumerate(labels)],
    }


def _translation(row: Row) -> Row:
    """`{"translation": {"en": ..., "de": ...}}`: from the first language to the second."""
    both = row["translation"]
    if not isinstance(both, dict) or len(both) != 2:
        raise DataError('"translation" must be an object of two languages')
    source, target = both.values()
    return {"source": checked_text(source, "translation"), "target": checked_text(target, "translation")}


def _labelled(content: str) -> Callable[[Row], Row]:
    def convert(row: Row) -> Row:
        value = checked_text(row[content], content) if content == "text" else _media(row[content], content)
        if row.get("labels") is not None:
            return {content: value, "labels": class_names(row["labels"], "labels")}
        if row.get("number") is not None:
            return {content: value, "number": number(row["number"], "number")}
        return {content: value, "label": class_name(row["label"], "label")}

    return convert


def _media(value: Any, name: str) -> Any:
    """Bytes, or a path; `datasets` writes both into one object."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, str) and value:
        return value
    raise DataError(f"{name!r} must be the bytes of a file or a path, not {type(value).__name__}")


def _listed(row: Row) -> str:
    return ", ".join(map(str, row))[:200]


def _unrecognised(row: Row, shape: str | None) -> str:
    known = ", ".join("+".join(f.needs) for f in FORMATS if shape in (None, f.shape))
    return (
        f"no columns that make a row (there are: {_listed(row)}); known are {known}. Name them in data.columns if they are called otherwise"
    )


def _format(name: str, shape: str, needs: str, convert: Callable[[Row], Row]) -> Format:
    return Format(name, shape, tuple(needs.split()), convert)


def _pair(row: Row) -> Row:
    return {"source": checked_text(row["source"], "source"), "target": checked_text(row["target"], "target")}


FORMATS = (
    _format("OpenAI chat", "chat", "messages", _chat),
    _format("ShareGPT", "chat", "conversations", lambda row: {"messages": from_sharegpt(row["conversations"])}),
    _format("preference triples", "preference", "chosen rejected", _preference),
    _format("Alpaca", "chat", "instruction output", _alpaca),
    _format("prompt and completion", "chat", "prompt completion", _exchange("prompt", "completion")),
    _format("prompt and response", "chat", "prompt response", _exchange("prompt", "response")),
    _format("question and answer", "chat", "question answer", _exchange("question", "answer")),
    _format("source and target", "pair", "source target", _pair),
    _format("translation", "pair", "translation", _translation),
    _format("labelled tokens", "token-labels", "tokens labels", _tokens),
    *(_format(f"{what} and {by}", what, f"{what} {by}", _labelled(what)) for what in ("image", "audio") for by in ANSWERS),
    *(_format(f"text and {by}", "labelled-text", f"text {by}", _labelled("text")) for by in ANSWERS),
    _format("plain text", "text", "text", lambda row: {"text": checked_text(row["text"], "text")}),
)
"""The first that fits is taken."""
