"""Reference answers as math-verify can read them. Text in, text out; knows no math-verify, so that nothing slow is imported here.

Data sets write references for people: ``$5$.``, ``5 dollars``, ``50%``, ``½``. Between the braces of ``\\boxed{}``, where
math-verify reads them, it takes such a text for another expression or for mere text, and no response ever equals it.
"""

from __future__ import annotations

import re

_NUMBER = r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
# A number and what it is a number of: one to three words of at least three letters, which single letters (variables) and cm are not.
_COUNTED = re.compile(rf"(?P<number>{_NUMBER})\s+(?P<unit>[A-Za-z]{{3,}}(?:[ -][A-Za-z]{{3,}}){{0,2}})")
_MATHEMATICAL = frozenset(
    (
        *("sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "pow", "mod", "max", "min", "abs", "lim", "inf", "infinity"),
        *("degrees", "percent", "and", "times", "plus", "minus", "over", "divided", "by"),
    )
)
_PERCENT = re.compile(rf"(?P<number>{_NUMBER})\s*(?:\\?%|percent)")
_DELIMITERS = ((r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))
_SIGNS = str.maketrans(
    {
        "∞": r"\infty ", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
        "²": "^{2}", "³": "^{3}", "€": "", "£": "", "¥": "", "−": "-", "\u00a0": " ",
    }
)  # fmt: skip
_ROOT = re.compile(r"√\s*(?:\(([^()]+)\)|(\w+))")
# What math-verify reads for certain, so that nobody has to ask it: a number, a fraction, a word, a letter of a choice.
_PLAIN = re.compile(rf"{_NUMBER}|[-+]?\d+/[1-9]\d*|\\frac\{{[\d.]+\}}\{{[1-9]\d*\}}|\(?[A-Za-z]\)?|[A-Za-z]+(?: [A-Za-z]+)*")


def reference_forms(answer: str) -> tuple[str, ...]:
    """Texts, each to be read between the braces of ``\\boxed{}``, any of which a correct response equals.

    An answer that has a box of its own is that box's. ``50%`` is the text as responses box it, and the value 50/100.
    """
    if "\\boxed" in answer:
        return (answer,)
    text = _bare(answer)
    if (match := _PERCENT.fullmatch(text)) is not None:
        number = match["number"].replace(",", "")
        return (rf"{number}\%", f"{number}%", rf"\frac{{{number}}}{{100}}")
    if (match := _COUNTED.fullmatch(text)) is not None and not _MATHEMATICAL & set(re.split(r"[ -]", match["unit"].lower())):
        return (match["number"],)
    return (text,)


def is_plain(answer: str) -> bool:
    """Whether math-verify reads an answer for certain. The others have to be tried."""
    return _PLAIN.fullmatch(reference_forms(answer)[-1]) is not None


def _bare(answer: str) -> str:
    """Without delimiters of formulas, emphasis, currency signs and the full stop of a sentence."""
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2]}}}", answer.translate(_SIGNS).replace(r"\$", "").replace("$", ""))
    before = None
    while text != before:
        before = text
        text = text.strip()
        if text.endswith((".", ",", ";")) and not text.endswith((r"\,", r"\;")):
            text = text[:-1]
        for opening, closing in _DELIMITERS:
            inner = text.removeprefix(opening).removesuffix(closing)
            if len(inner) == len(text) - len(opening) - len(closing) and opening not in inner:
                text = inner
    return text
