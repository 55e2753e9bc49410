"""The form of OpenAI's answers, as JSON schemas: required keys and types of the published reference
(https://platform.openai.com/docs/api-reference/chat/object, .../chat/streaming, .../models/object), by hand."""

COUNT = {"type": "integer", "minimum": 0}
USAGE = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT},
}
REASON = {"enum": ["stop", "length", "content_filter", "tool_calls", "function_call"]}


def envelope(kind, choice):
    """An object that holds choices."""
    return {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices"],
        "properties": {
            "id": {"type": "string", "minLength": 1},
            "object": {"const": kind},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "choices": {"type": "array", "items": choice},
            "usage": {"anyOf": [USAGE, {"type": "null"}]},
        },
    }


COMPLETION = envelope(
    "chat.completion",
    {
        "type": "object",
        "required": ["index", "message", "finish_reason", "logprobs"],
        "properties": {
            "index": COUNT,
            "finish_reason": REASON,
            "message": {
                "type": "object",
                "required": ["role", "content", "refusal"],
                "properties": {"role": {"const": "assistant"}, "content": {"type": "string"}},
            },
        },
    },
)
CHUNK = envelope(
    "chat.completion.chunk",
    {
        "type": "object",
        "required": ["index", "delta", "finish_reason"],
        "properties": {
            "index": COUNT,
            "finish_reason": {"anyOf": [REASON, {"type": "null"}]},
            "delta": {"type": "object", "properties": {"role": {"const": "assistant"}, "content": {"type": "string"}}},
        },
    },
)
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": {"type": "string", "minLength": 1}, "type": {"type": "string"}},
        }
    },
}
MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {"object": {"const": "model"}, "created": {"type": "integer"}},
}
MODELS = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "minItems": 1, "items": MODEL}},
}
