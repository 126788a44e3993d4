"""docs/api.md, made from the OpenAPI document: `python -m tests.reference` writes it; a test compares."""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from relay.web.openapi import document
from relay.web.operations import OPERATIONS

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
HEAD = """# API reference

<!-- made by `python -m tests.reference` from the OpenAPI document -->

The same as `/openapi.json` of a running relay (OpenAPI 3.1, with every limit and pattern) and its page
`/docs`, to be read here. JSON in and out, with `Authorization: Bearer <key>`: a key that has the scope which
is named.

- **Lists** are `{"data": […], "next_cursor": …}`, the newest first: give `next_cursor` as `cursor` for what
  comes after. A page of large events or generations ends at about 4 MiB, before its `limit`: there is more
  unless `next_cursor` is null.
- **Times** are RFC 3339, in UTC with milliseconds.
- **Refusals** are problem+json (RFC 9457): `type`, `title`, `status`, `detail`, and for bad input
  `errors: [{"field", "message"}]`. Besides what is said at each operation: 400 malformed, 401 no or bad key,
  403 the key lacks the scope, 404 unknown (or another tenant's), 413 and 415 a body that is not taken, 422
  well-formed but invalid, 429 the key is limited, 503 the database takes nothing for now (both with
  `Retry-After`): nothing was changed.
- **`Idempotency-Key`** is honoured where it is mentioned: the same request under the same key creates one
  thing.

## A client of your own

Any generator for OpenAPI 3.1 makes one from `/openapi.json`. For Python
[openapi-python-client](https://github.com/openapi-generators/openapi-python-client) is kept up:

```sh by hand
curl -fsS localhost:8080/openapi.json -o relay.json
pipx run openapi-python-client generate --path relay.json --meta none --output-path relay_client
```
"""


def reference() -> str:
    """The whole page."""
    described = document(OPERATIONS)
    schemas = described["components"]["schemas"]
    listed = [
        (method.upper(), path, operation)
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    ]
    answers = Counter(one for *_, operation in listed for one in _answers(operation))
    usual = {one for one, count in answers.items() if one[0] >= "400" and count > len(listed) / 5}
    lines = [HEAD]
    for tag, group in groupby(listed, key=lambda one: one[2]["tags"][0]):
        lines.append(f"## {tag}\n")
        for method, path, operation in group:
            lines += _operation(method, path, operation, usual)
    lines.append("## What is sent to endpoints\n\n| type | `data` |\n|---|---|")
    for name, hook in described["webhooks"].items():
        lines.append(f"| `{name}` | {_data(hook['post']['requestBody']['content']['application/json'])} |")
    lines.append("\n## Objects\n")
    for name, schema in sorted(schemas.items()):
        if not name.startswith("Page_"):
            lines += _object(name, schema)
    return "\n".join(lines).rstrip() + "\n"


def _answers(operation: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    return [(status, answer["description"]) for status, answer in operation["responses"].items()]


def _operation(
    method: str, path: str, operation: Mapping[str, Any], usual: Collection[tuple[str, str]]
) -> Iterator[str]:
    scope = operation.get("x-scope")
    needs = f"Scope `{scope}`." if scope else "No key."
    yield f"### {method} {path}\n\n{operation['summary']}. {needs}\n"
    parameters = [one for one in operation.get("parameters", ()) if one["in"] == "query"]
    takes = [f"`{one['name']}`: {_type(one['schema'])}" for one in parameters]
    if takes:
        yield f"Query: {', '.join(takes)}.\n"
    if any(one["name"] == "Idempotency-Key" for one in operation.get("parameters", ())):
        yield "Honours `Idempotency-Key`.\n"
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    if content.get("schema"):
        yield f"Body: {_type(content['schema'])}.\n"
    if "example" in content:
        yield f"For example `{json.dumps(content['example'])}`.\n"
    for status, description in sorted(set(_answers(operation)) - set(usual)):
        answer = operation["responses"][status]
        body = answer.get("content", {}).get("application/json", {}).get("schema")
        yield f"- {status} {description}{f': {_type(body)}' if body else ''}"
    yield ""


def _object(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {name}\n"
    if schema.get("description"):
        yield f"{_cell(schema['description'])}\n"
    if "enum" in schema:
        yield "One of " + ", ".join(f"`{one}`" for one in schema["enum"]) + ".\n"
        return
    yield "| field | type | |\n|---|---|---|"
    required = schema.get("required", ())
    for field, one in schema.get("properties", {}).items():
        notes = [] if field in required or "default" not in one else [_default(one["default"])]
        notes += [one["description"]] if one.get("description") else []
        yield f"| `{field}` | {_type(one)} | {_cell('; '.join(note for note in notes if note))} |"
    yield ""


def _data(content: Mapping[str, Any]) -> str:
    schema = content["schema"]["properties"]["data"]
    if "$ref" in schema:
        return _type(schema)
    return ", ".join(f"`{name}`" for name in content["example"]["data"])


def _default(value: Any) -> str:
    return "" if value in (None, "") else f"default `{json.dumps(value)}`"


def _type(schema: Mapping[str, Any]) -> str:
    """In a few words; a pattern or a limit is in the document itself."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name.startswith("Page_"):
            inner = name.removeprefix("Page_").removesuffix("_")
            return f"a page of [{inner}](#{inner.lower()})"
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            kinds = [_type(one) for one in schema[several]]
            return " or ".join(dict.fromkeys(kind for kind in kinds if kind))
    if "enum" in schema:
        return ", ".join(f"`{one}`" for one in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {})) or 'anything'}"
    if schema.get("format") == "date-time":
        return "time"
    return {"boolean": "true or false", None: "anything"}.get(schema.get("type"), str(schema.get("type")))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(reference(), "utf-8")
