"""Random JSON schemas of what structured output promises to enforce, each with outputs of bounded length."""

import random
from typing import Any

Schema = dict[str, Any]
_WORDS = ("name", "age", "city", "tags", "ok", "när", "a b", 'quo"te', "x/y", "date", "zip", "kind")
_PATTERNS = ("^[a-z]{1,8}$", "^[A-Z][0-9]{2,4}$", "^(red|green|blue)$", "^\\d{3}-\\d{4}$")
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4")


def random_schema(rng: random.Random, depth: int = 3) -> Schema:
    """An object at the top, as tools and most clients want it."""
    schema = _object(rng, depth)
    if rng.random() < 0.2:
        schema["$defs"] = {"shared": _scalar(rng)}
        schema["properties"]["shared"] = {"$ref": "#/$defs/shared"}
        schema["required"] = [*schema["required"], "shared"]
    return schema


def _value(rng: random.Random, depth: int) -> Schema:
    if depth <= 0 or rng.random() < 0.5:
        return _scalar(rng)
    return rng.choice([_object, _array, _any_of])(rng, depth - 1)


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(_WORDS, rng.randint(1, 4))
    schema: Schema = {
        "type": "object",
        "properties": {name: _value(rng, depth - 1) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
    }
    closing = rng.random()
    if closing < 0.7:
        schema["additionalProperties"] = False
    elif closing < 0.85:
        schema |= {"additionalProperties": {"type": "integer", "maximum": 99, "minimum": 0}}
        schema |= {"required": names, "maxProperties": len(names) + 2}
    return schema


def _array(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(0, 2)
    schema: Schema = {"type": "array", "minItems": least, "maxItems": least + rng.randint(0, 2)}
    if rng.random() < 0.2:
        schema["prefixItems"] = [_value(rng, depth) for _ in range(rng.randint(1, 2))]
    schema["items"] = _value(rng, depth)
    return schema


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_value(rng, depth) for _ in range(rng.randint(2, 3))]}


def _scalar(rng: random.Random) -> Schema:
    low = rng.randint(-50, 50)
    return rng.choice(
        [
            {"type": "string", "maxLength": rng.randint(1, 20)},
            {"type": "string", "minLength": 2, "maxLength": 6},
            {"type": "string", "pattern": rng.choice(_PATTERNS)},
            {"type": "string", "format": rng.choice(_FORMATS)},
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)},
            {"type": "integer", "exclusiveMinimum": low, "maximum": low + 1000},
            {"type": "integer", "minimum": 0, "maximum": 900, "multipleOf": rng.randint(2, 30)},
            {"type": "number", "minimum": low, "maximum": low + 10},
            {"type": "boolean"},
            {"type": "null"},
            {"type": ["boolean", "null"]},
            {"const": rng.choice(["fixed", 7, None, True, {"a": [1, 2]}])},
            {"enum": rng.sample(["red", "green", 1, 2.5, None, False, "a\nb", "ü"], 3)},
        ]
    )
