"""Grammars for constrained texts, as llguidance reads them: from a JSON schema, a regular expression or Lark's syntax.
Imports no torch.
"""

from __future__ import annotations

import json
from typing import Any

from mambakit.quoting import cut

KINDS = ("json_schema", "regex", "grammar")
MESSAGE = 500  # characters of an error message of llguidance, which may quote the whole grammar
# The white space of Python's json.dumps and no other: a small model that may choose white space can choose it without
# end. A schema's own "x-guidance" overrides these.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def grammar_of(kind: str, value: Any, tokens: Any = None) -> str:
    """The grammar, checked.

    Args:
        kind: "json_schema", "regex" or "grammar".
        value: a schema as a dictionary or as text; text of the other kinds.
        tokens: llguidance's table of a tokenizer; without one only what does not depend on it is checked.

    Raises:
        ValueError: it does not compile.
        ImportError: llguidance is not installed.
    """
    compiler = llguidance().LLMatcher
    try:
        if kind == "json_schema":
            schema = json.loads(value) if isinstance(value, str) else value
            grammar: str = compiler.grammar_from_json_schema(json.dumps(schema), defaults=_JSON)
        elif kind == "regex":
            grammar = compiler.grammar_from_regex(value)
        else:
            grammar = compiler.grammar_from_lark(value)
        failed, messages = compiler.validate_grammar_with_warnings(grammar, tokens)
    except (ValueError, TypeError, RecursionError) as error:
        failed, messages = True, [str(error)]
    if failed:
        raise ValueError(f"the {kind} cannot be used: {cut(' '.join(' '.join(messages).split()), MESSAGE)}")
    return grammar


def llguidance() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError as error:
        if error.name != "llguidance":  # llguidance is installed, and a module of its own is missing
            raise
        raise ImportError("constrained output needs llguidance: pip install 'mambakit[constrain]'") from error
    return llguidance
