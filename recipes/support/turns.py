"""Turns of chats, however they are written, as chat templates read them: role, content and calls of tools."""

import json
from typing import Any

Turn = dict[str, Any]

# The names that ShareGPT and its relatives give to roles, and OpenAI's former name of the tool.
_ROLES = {
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response"), "tool"),
}
_READ_KEYS = ("role", "from", "content", "value", "tool_calls", "function_call")
_TEXT_PARTS = ("text", "input_text", "output_text")


class BadRecordError(ValueError):
    """A record that cannot be used; its place is added by whoever knows it."""


def read_turns(value: Any, *, nulls: bool = True) -> list[Turn]:
    """Return the turns of a chat.

    Args:
        value: a list of turns of `role` and `content`, or `from` and `value`; or such a list as JSON.
        nulls: whether a null in the arguments of a call stands for itself. Tables fill with them what other records
            have and this one lacks.

    Raises:
        BadRecordError: there is none, or one is no turn.
    """
    turns = _parsed(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if isinstance(turns, dict) and turns and all(isinstance(column, list) for column in turns.values()):
        # Older data sets keep a chat as one list for each key.
        turns = [dict(zip(turns, values, strict=False)) for values in zip(*turns.values(), strict=False)]
    if not isinstance(turns, list) or not turns:
        raise BadRecordError("a chat must be a list of at least one message.")
    return [_read_turn(turn, nulls=nulls) for turn in turns]


def read_tools(value: Any, *, nulls: bool = True) -> list[dict[str, Any]] | None:
    """Return the descriptions of tools, given as a list or as JSON, or None where there are none.

    Raises:
        BadRecordError: it is no list of descriptions, each with a name.
    """
    tools = _parsed(value) if isinstance(value, str) and value.strip() else value
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRecordError(f"'tools' must be a list of descriptions of functions, not {_shortened(value)}.")
    tools = tools if nulls else without_nulls(tools)
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    for tool in tools:
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise BadRecordError(f"a tool must have a name: {_shortened(tool)}.")
    return tools


def without_nulls(value: Any) -> Any:
    """Return nested lists and mappings without the keys whose value is null."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _read_turn(turn: Any, *, nulls: bool) -> Turn:
    role = (turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None
    if not isinstance(role, str):
        raise BadRecordError(f"a message must have a 'role' and a 'content': {_shortened(turn)}.")
    rest = {key: value for key, value in turn.items() if value is not None and key not in _READ_KEYS}
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    calls = turn.get("tool_calls") or [call for call in [turn.get("function_call")] if call]
    if role == "function_call":
        content, calls = None, _parsed(content)
    role = _ROLES.get(role, role)
    if role == "tool" and isinstance(content, dict):
        content = json.dumps(content, ensure_ascii=False)  # what a tool returned, before it was written
    read = {"role": role, "content": _read_content(content, turn, may_lack=bool(calls)), **rest}
    if calls:
        calls = _parsed(calls) if isinstance(calls, str) else calls
        read["tool_calls"] = [
            _read_call(call, nulls=nulls) for call in (calls if isinstance(calls, list) else [calls])
        ]
    return read


def _read_content(content: Any, turn: Turn, *, may_lack: bool) -> str | None:
    """Return the text, joined where it comes in parts; beside calls of tools there may be none."""
    if isinstance(content, str) or (content is None and may_lack):
        return content
    if not isinstance(content, list):
        raise BadRecordError(f"the content of a message must be text: {_shortened(turn)}.")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise BadRecordError(f"the content of a message has a part of type '{kind}': only text can be learnt.")
        texts.append(text)
    return "".join(texts)


def _read_call(call: Any, *, nulls: bool) -> dict[str, Any]:
    """Return a call with its arguments as a mapping, which is what templates expect; OpenAI writes them as JSON."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRecordError(f"a call of a tool must have a name: {_shortened(call)}.")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = _parsed(arguments) if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise BadRecordError(f"the arguments of a call must be an object, or one as JSON: {_shortened(arguments)}.")
    named = {"name": function["name"], "arguments": arguments if nulls else without_nulls(arguments)}
    identity = {"id": call["id"]} if function is not call and call.get("id") is not None else {}
    return {"type": "function", **identity, "function": named}


def _parsed(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise BadRecordError(f"not JSON ({error}): {_shortened(text)}.") from error


def _shortened(value: Any) -> str:
    written = repr(value)
    return written if len(written) <= 160 else f"{written[:150]} ..."
