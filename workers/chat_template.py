"""Messages to text by a tokenizer's chat template, which is a program of the tokenizer's: it may fail for one row as it likes.

Knows no data file; who has the row says which it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from workers.row_files import BadRow

# What templates raise for messages that they are not made for: by themselves, and where an expression takes a list for a string.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)


def refusal(error: Exception) -> BadRow:
    """The reason that a row is left out for, of one of ``TEMPLATE_ERRORS``."""
    kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
    return BadRow(f"the chat template refuses it: {kind}{error}")


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
    """The text of a conversation. Raises BadRow where the template fails."""
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
    except TEMPLATE_ERRORS as error:
        raise refusal(error) from None
    return text
