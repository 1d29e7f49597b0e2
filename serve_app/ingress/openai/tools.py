"""Tools that the model may call: what clients say of them, what the template and the grammar are told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from serve_app.ingress.door import require
from serve_app.ingress.faults import BadInputError

MAX_TOOLS = 128


class FunctionTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    function: FunctionTool
    type: Literal["function"] = "function"


class NamedFunction(msgspec.Struct, kw_only=True):
    name: str


class NamedTool(msgspec.Struct, kw_only=True):
    function: NamedFunction
    type: Literal["function"] = "function"


ToolChoice = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True)
class Toolbox:
    """The tools of one request that are in play. `is_forced`: the answer is a call of one of them, and nothing else."""

    tools: Sequence[Tool] = ()
    is_forced: bool = False

    def for_template(self) -> list[dict[str, Any]] | None:
        return [_for_template(tool) for tool in self.tools] or None

    def schema(self) -> dict[str, Any]:
        """Of the one call that is forced: `{"name": ..., "arguments": ...}`."""
        calls = [_call_schema(tool.function, f"#/anyOf/{i}") for i, tool in enumerate(self.tools)]
        return {"anyOf": calls}

    def told(self) -> str:
        """For a system message, where the template has no place for tools."""
        listed = "\n".join(msgspec.json.encode(tool["function"]).decode() for tool in self.for_template() or ())
        return (
            f"You can call these functions:\n{listed}\n"
            'Answer with one call, as JSON: {"name": "the function\'s name", "arguments": {...}}'
        )


def toolbox(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> Toolbox:
    """What the client wants done with its tools. Raises BadInputError."""
    if not tools:
        is_forced = choice == "required" or isinstance(choice, NamedTool)
        require(not is_forced, "tool_choice", "only allowed when tools are given")
        return Toolbox()
    require(len(tools) <= MAX_TOOLS, "tools", f"{len(tools)} of them; the limit is {MAX_TOOLS}")
    names = [tool.function.name for tool in tools]
    require(len(set(names)) == len(names), "tools", "two of one name")
    match choice:
        case "none":
            return Toolbox()
        case None | "auto":
            return Toolbox(tools)
        case "required":
            return Toolbox(tools, is_forced=True)
    chosen = [tool for tool in tools if tool.function.name == choice.function.name]
    if not chosen:
        raise BadInputError("tool_choice.function.name", f"{choice.function.name[:64]!r} is none of the tools")
    return Toolbox(chosen, is_forced=True)


def call_text(name: str, arguments: str) -> str:
    """A call as the model writes it when it is forced to. `arguments` is JSON already."""
    return f'{{"name": {msgspec.json.encode(name).decode()}, "arguments": {arguments or "{}"}}}'


def _for_template(tool: Tool) -> dict[str, Any]:
    """All three keys: templates read them unasked."""
    function = tool.function
    return {
        "type": "function",
        "function": {
            "name": function.name,
            "description": function.description or "",
            "parameters": function.parameters or {"type": "object", "properties": {}},
        },
    }


def _call_schema(function: FunctionTool, path: str) -> dict[str, Any]:
    arguments = moved_schema(function.parameters or {"type": "object"}, f"{path}/properties/arguments")
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def moved_schema(schema: Any, path: str) -> Any:
    """`schema` as it stands at `path` in a larger one: its references to itself point there now."""
    if isinstance(schema, list):
        return [moved_schema(item, path) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: moved_schema(value, path) for key, value in schema.items()}
    target = schema.get("$ref")
    if isinstance(target, str) and target.startswith("#"):
        moved["$ref"] = path + target.removeprefix("#")
    return moved
