"""Filters on the payload: a JMESPath expression over an event's body, `{type, timestamp, data}`.

What it finds is wanted unless that is nothing, by JMESPath's own word: null, false, or an empty text, list or
object. It cannot take longer than a few milliseconds: its length is limited, it builds nothing that grows,
and whoever needs more than STEPS gets nothing.
"""

import json
import logging
import warnings
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import jmespath
from jmespath.exceptions import JMESPathError
from jmespath.functions import Functions
from jmespath.visitor import Options, TreeInterpreter

log = logging.getLogger(__name__)
LONGEST, DEEPEST = 1_000, 100
STEPS = 1_000
# So many elements of a value cost a step too, so many characters, and so many of all that is in a value when
# it is compared, searched or sorted.
_GRAIN, _GRAIN_OF_TEXT, _GRAIN_OF_ALL = 64, 1_024, 8
# What filters have found lately: of so many bodies, more than a batch of reports is announced with.
_KNOWN = 10_000
_AT_ONCE = {"length", "type"}
# What makes more of what it is given, and again of that.
_GROWS = {"multi_select_list": "[a, b]", "multi_select_dict": "{a: b}"}
_REFUSED = {"join", "map", "merge", "to_array", "to_string"}
_FUNCTIONS = Functions()


class _TooMuch(Exception):
    pass


class _Interpreter(TreeInterpreter):
    def __init__(self) -> None:
        super().__init__(Options(custom_functions=_FUNCTIONS))
        self._left = STEPS

    def visit(self, node: Any, *args: Any, **kwargs: Any) -> Any:
        value = super().visit(node, *args, **kwargs)
        if isinstance(value, list | dict):
            self._pay(1 + len(value) // _GRAIN)
        else:
            self._pay(1 + (len(value) // _GRAIN_OF_TEXT if isinstance(value, str) else 0))
        return value

    def visit_comparator(self, node: Any, value: Any) -> Any:
        if node["value"] not in ("eq", "ne"):
            return super().visit_comparator(node, value)
        left, right = [self.visit(child, value) for child in node["children"]]
        if isinstance(left, list | dict) and isinstance(right, list | dict):
            self._pay_for_all(left)
        return self.COMPARATOR_FUNC[node["value"]](left, right)

    def visit_flatten(self, node: Any, value: Any) -> Any:
        base = self.visit(node["children"][0], value)
        if not isinstance(base, list):
            return None
        self._pay(len(base) // _GRAIN_OF_ALL)
        return [one for each in base for one in (each if isinstance(each, list) else [each])]

    def visit_function_expression(self, node: Any, value: Any) -> Any:
        arguments = [self.visit(child, value) for child in node["children"]]
        if node["value"] not in _AT_ONCE:
            self._pay_for_all(arguments)
        return _FUNCTIONS.call_function(node["value"], arguments)

    def _pay(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise _TooMuch(f"it took more than {STEPS} steps")

    def _pay_for_all(self, value: Any) -> None:
        """For everything that is in a value, before it is looked at."""
        waiting, count = [value], 0
        while waiting:
            inside = waiting.pop()
            if not isinstance(inside, list | dict):
                continue
            count += len(inside)
            if count > self._left * _GRAIN_OF_ALL:
                self._pay(STEPS + 1)
            waiting += inside if isinstance(inside, list) else inside.values()
        self._pay(count // _GRAIN_OF_ALL)


class _Filter:
    """An expression that is compiled."""

    def __init__(self, tree: Any) -> None:
        self._tree, self._has_failed = tree, False

    def passes(self, body: bytes, *, endpoint: str) -> bool:
        known = _known(_digest(body))
        if self not in known:
            known[self] = self._find(body, endpoint)
        return known[self]

    def _find(self, body: bytes, endpoint: str) -> bool:
        try:
            found = _Interpreter().visit(self._tree, _content(body))
        except Exception as error:
            if not self._has_failed:
                self._has_failed = True
                log.warning("filter.failed", extra={"endpoint": endpoint, "error": str(error)})
            return False
        return found is not None and found is not False and found not in ("", [], {})


def passes(expression: str, body: bytes, *, endpoint: str) -> bool:
    """Whether the filter of an endpoint lets this body through. Where it makes no sense of it, it does not:
    the log says so once. Asked again soon, it knows."""
    return _compiled(expression).passes(body, endpoint=endpoint)


def checked(expression: str) -> str:
    """The expression. Raises ValueError that says what is wrong with it."""
    if not 1 <= len(expression) <= LONGEST:
        raise ValueError(f"must be 1 to {LONGEST} characters long")
    # Before it is parsed: that is as deep.
    if sum(map(expression.count, "([{!")) > DEEPEST:
        raise ValueError("is nested too deeply, or chains too much")
    _check(_parsed(expression))
    return expression


@lru_cache(maxsize=1_000)
def _compiled(expression: str) -> _Filter:
    return _Filter(_parsed(expression))


@lru_cache(maxsize=_KNOWN)
def _known(digest: bytes) -> dict[_Filter, bool]:
    """What was found of a body, to be added to."""
    return {}


# One event after the other is held against all the filters, by a few at once: they pause between two.
@lru_cache(maxsize=4)
def _content(body: bytes) -> Any:
    return json.loads(body)


@lru_cache(maxsize=4)
def _digest(body: bytes) -> bytes:
    return blake2b(body, digest_size=16).digest()


def _parsed(expression: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PendingDeprecationWarning)
            return jmespath.compile(expression).parsed
    except PendingDeprecationWarning as error:
        raise ValueError(
            "is no JMESPath expression: what stands between ` must be JSON; text stands in single quotes"
        ) from error
    except (JMESPathError, ValueError) as error:
        raise ValueError(f"is no JMESPath expression: {str(error).splitlines()[0]}") from error


def _check(node: Any) -> None:
    waiting = [(node, 1)]
    while waiting:
        node, depth = waiting.pop()
        if not isinstance(node, dict):
            continue  # the bounds of a slice
        if depth > DEEPEST:
            raise ValueError("is nested too deeply, or chains too much")
        kind, name = node["type"], str(node.get("value"))
        if kind in _GROWS:
            raise ValueError(f"must not build values, as {_GROWS[kind]} does; a literal is written `[1, 2]`")
        if kind == "function_expression":
            _check_call(name, node["children"])
        if kind != "literal":
            waiting += [(child, depth + 1) for child in node["children"]]


def _check_call(name: str, arguments: list[Any]) -> None:
    known = _FUNCTIONS.FUNCTION_TABLE.get(name)
    if known is None:
        raise ValueError(f"has no function {name}()")
    if name in _REFUSED:
        raise ValueError(f"must not use {name}(), which makes new values")
    wanted = known["signature"]
    varies = bool(wanted) and wanted[-1].get("variadic", False)
    if len(arguments) < len(wanted) or (len(arguments) > len(wanted) and not varies):
        raise ValueError(f"gives {name}() {len(arguments)} arguments; it takes {len(wanted)}")
