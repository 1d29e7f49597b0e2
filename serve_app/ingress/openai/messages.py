"""Chat messages as clients write them, and as chat templates read them."""

from collections.abc import Sequence
from typing import Any

import msgspec

from serve_app.ingress.door import require
from serve_app.ingress.faults import BadInputError
from serve_app.ingress.openai.tools import call_text


class TextPart(msgspec.Struct, tag_field="type", tag="text", kw_only=True):
    text: str


class RefusalPart(msgspec.Struct, tag_field="type", tag="refusal", kw_only=True):
    refusal: str


class ImagePart(msgspec.Struct, tag_field="type", tag="image_url", kw_only=True):
    image_url: Any = None


class AudioPart(msgspec.Struct, tag_field="type", tag="input_audio", kw_only=True):
    input_audio: Any = None


class VideoPart(msgspec.Struct, tag_field="type", tag="video_url", kw_only=True):
    video_url: Any = None


class FilePart(msgspec.Struct, tag_field="type", tag="file", kw_only=True):
    file: Any = None


Part = TextPart | RefusalPart | ImagePart | AudioPart | VideoPart | FilePart
Content = str | list[Part]


class FunctionCall(msgspec.Struct, kw_only=True):
    name: str
    arguments: str = "{}"  # JSON


class ToolCall(msgspec.Struct, kw_only=True):
    id: str
    function: FunctionCall
    type: str = "function"


class SystemMessage(msgspec.Struct, tag_field="role", tag="system", kw_only=True, forbid_unknown_fields=True):
    content: Content
    name: str | None = None


class DeveloperMessage(msgspec.Struct, tag_field="role", tag="developer", kw_only=True, forbid_unknown_fields=True):
    content: Content
    name: str | None = None


class UserMessage(msgspec.Struct, tag_field="role", tag="user", kw_only=True, forbid_unknown_fields=True):
    content: Content
    name: str | None = None


class AssistantMessage(msgspec.Struct, tag_field="role", tag="assistant", kw_only=True):
    """What a server said before. Clients send all of it back, other servers' fields included: those are ignored."""

    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None


class ToolMessage(msgspec.Struct, tag_field="role", tag="tool", kw_only=True, forbid_unknown_fields=True):
    content: Content
    tool_call_id: str
    name: str | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


def for_template(messages: Sequence[Message], template: str, *, has_tools: bool) -> list[dict[str, Any]]:
    """Dicts for a template of this source. `has_tools`: it knows tool calls and their results.

    To one that does not, a call is told as the JSON that the model wrote, and its result as the user's word; and a
    developer is the system, unless the template mentions developers.
    """
    developer = "developer" if "developer" in template else "system"
    told = []
    for i, message in enumerate(messages):
        path = f"messages[{i}]"
        match message:
            case DeveloperMessage():
                told.append(_plain(developer, message, path))
            case AssistantMessage():
                told.append(_assistant(message, path, has_tools=has_tools))
            case ToolMessage() if has_tools:
                told.append({**_plain("tool", message, path), "tool_call_id": message.tool_call_id})
            case SystemMessage():
                told.append(_plain("system", message, path))
            case _:
                told.append(_plain("user", message, path))
    return told


def _plain(
    role: str, message: SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage, path: str
) -> dict[str, Any]:
    plain = {"role": role, "content": _text(message.content or "", f"{path}.content")}
    return {**plain, "name": message.name} if message.name is not None else plain


def _assistant(message: AssistantMessage, path: str, *, has_tools: bool) -> dict[str, Any]:
    calls = message.tool_calls or []
    require(message.content is not None or bool(calls), f"{path}.content", "needed where there are no tool_calls")
    plain = _plain("assistant", message, path)
    if not calls:
        return plain
    if not has_tools:
        texts = [call_text(call.function.name, call.function.arguments) for call in calls]
        return {**plain, "content": "\n".join([plain["content"], *texts] if plain["content"] else texts)}
    return {**plain, "tool_calls": [_call(call, f"{path}.tool_calls[{i}]") for i, call in enumerate(calls)]}


def _call(call: ToolCall, path: str) -> dict[str, Any]:
    """Templates want the arguments as an object: they write the JSON themselves."""
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}")
    except (msgspec.DecodeError, RecursionError):
        raise BadInputError(f"{path}.function.arguments", "not valid JSON") from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _text(content: Content, path: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_part_text(part, f"{path}[{i}]") for i, part in enumerate(content))


def _part_text(part: Part, path: str) -> str:
    match part:
        case TextPart(text=text):
            return text
        case RefusalPart(refusal=text):
            return text
    raise BadInputError(path, "this model reads text only: no images, audio, video or files")
