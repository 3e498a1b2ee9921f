"""Tools, calls of them and forms of an answer on the wire, as OpenAI's client sends them."""

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from serving.calls import Tools
from serving.errors import RequestError

ANY_OBJECT: dict[str, Any] = {"type": "object"}
NAME = r"^[a-zA-Z0-9_-]{1,64}$"
TOOLS_AT_MOST = 128
SCHEMA_BYTES_AT_MOST = 64 * 1024
"""Of one schema, and of those of all tools of a request. One of 90 KB with 3,000 properties takes some 3 s to compile."""
SCHEMA_DEPTH_AT_MOST = 64
"""Lists and objects inside one another; each level of an answer takes two."""


def encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    return text


Text = Annotated[str, AfterValidator(encodable)]
"""JSON can spell strings that no tokenizer and no UTF-8 answer can hold."""


def _bounded(schema: dict[str, Any]) -> dict[str, Any]:
    deeper: list[Any] = [schema]
    depth = 0
    while deeper:  # level by level: a recursion could itself be too deep
        depth += 1
        if depth > SCHEMA_DEPTH_AT_MOST:
            raise ValueError(f"a schema has at most {SCHEMA_DEPTH_AT_MOST} lists and objects inside one another")
        values = [value for each in deeper for value in (each.values() if isinstance(each, dict) else each)]
        deeper = [value for value in values if isinstance(value, dict | list)]
    encodable(json.dumps(schema, ensure_ascii=False))
    if _size(schema) > SCHEMA_BYTES_AT_MOST:
        raise ValueError(f"a schema has at most {SCHEMA_BYTES_AT_MOST:,} bytes; this has {_size(schema):,}")
    return schema


def _size(schema: dict[str, Any] | None) -> int:
    return len(json.dumps(schema))


Schema = Annotated[dict[str, Any], AfterValidator(_bounded)]


class JsonSchema(BaseModel):
    """`response_format.json_schema`."""

    model_config = ConfigDict(strict=True)

    name: str = Field(pattern=NAME)
    description: Text | None = None
    shape: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None
    """It makes no difference: an answer always follows the schema."""


class ResponseFormat(BaseModel):
    """`response_format`."""

    model_config = ConfigDict(strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise RequestError("response_format.json_schema goes with the type json_schema", "response_format.json_schema")
        return self

    @property
    def followed(self) -> dict[str, Any] | None:
        """The schema that answers must follow; None is any text."""
        if self.type == "text":
            return None
        return ANY_OBJECT if self.json_schema is None or self.json_schema.shape is None else self.json_schema.shape


class Function(BaseModel):
    """What a tool does."""

    model_config = ConfigDict(strict=True)

    name: str = Field(pattern=NAME)
    description: Text | None = None
    parameters: Schema | None = None
    strict: bool | None = None
    """Whether a schema of which something cannot be enforced is an error."""


class Tool(BaseModel):
    """One of `tools`."""

    model_config = ConfigDict(strict=True)

    type: Literal["function"]
    function: Function

    def as_given(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class FunctionName(BaseModel):
    """Names a function."""

    model_config = ConfigDict(strict=True)

    name: str


class NamedTool(BaseModel):
    """`tool_choice` of one tool."""

    model_config = ConfigDict(strict=True)

    type: Literal["function"]
    function: FunctionName


class CalledFunction(BaseModel):
    """What an assistant called."""

    model_config = ConfigDict(strict=True)

    name: str = Field(pattern=NAME)
    arguments: Text

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> "CalledFunction":
        if not isinstance(_parsed(self.arguments), dict):
            raise ValueError("arguments are a JSON object, as a string")
        return self


class ToolCall(BaseModel):
    """One of a message's `tool_calls`."""

    model_config = ConfigDict(strict=True)

    id: Text = Field(min_length=1)
    type: Literal["function"] = "function"
    function: CalledFunction

    def as_row(self) -> dict[str, Any]:
        """With the arguments as an object, which templates write in their own way."""
        function = {"name": self.function.name, "arguments": _parsed(self.function.arguments)}
        return {"id": self.id, "type": self.type, "function": function}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _one_of_them(value: Any, known: ValidatorFunctionWrapHandler) -> Any:
    try:
        return known(value)
    except ValidationError:  # which of a union's types a value is not is no help
        raise ValueError('is "none", "auto", "required" or {"type": "function", "function": {"name": ...}}') from None


ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedTool, WrapValidator(_one_of_them)]


def tools_of(tools: list[Tool] | None, choice: ToolChoice | None, *, parallel: bool) -> Tools | None:
    """What an answer may call; None where it may call nothing, and then the model is not shown the tools either.

    Raises:
        RequestError: the choice goes with none of the tools, two of them share a name, or they are too large together.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise RequestError("tool_choice needs tools to choose from", "tool_choice")
        return None
    names = [tool.function.name for tool in tools]
    for n, name in enumerate(names):
        if name in names[:n]:
            raise RequestError(f"tools[{n}].function.name: there is a tool {name} already", f"tools[{n}].function.name")
    if sum(_size(tool.function.parameters) for tool in tools) > SCHEMA_BYTES_AT_MOST:
        raise RequestError(f"the schemas of all tools together have at most {SCHEMA_BYTES_AT_MOST:,} bytes; leave some out", "tools")
    if choice == "none":
        return None
    wanted = choice.function.name if isinstance(choice, NamedTool) else choice or "auto"
    if isinstance(choice, NamedTool) and wanted not in names:
        raise RequestError(f"tool_choice names {wanted[:100]!r}, which is none of the tools", "tool_choice")
    return Tools([tool.as_given() for tool in tools], wanted, parallel)
