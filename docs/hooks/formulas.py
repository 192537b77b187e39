"""Formulas as MathML, converted while the site is built: a page needs no script and no font from elsewhere.

``pymdownx.arithmatex`` finds the formulas, in pages and in docstrings alike; this hook replaces what it leaves. A
command that the converter does not know would come out as its own name, so that stops the build.
"""

from __future__ import annotations

import html
import re
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

_FOUND = re.compile(
    r'<span class="arithmatex">\\\((?P<inline>.*?)\\\)</span>'
    r'|<div class="arithmatex">\s*\\\[(?P<display>.*?)\\\]\s*</div>',
    re.DOTALL,
)
# other names of the same symbols, for a converter that knows one of them
_SAME = (
    (re.compile(r"\\([bB]igg?)[lrm](?![a-zA-Z])"), r"\\\1"),
    (re.compile(r"\\[lr]?vert(?![a-zA-Z])"), "|"),
    (re.compile(r"\\[lr]?Vert(?![a-zA-Z])"), r"\\|"),
)
_PARTS = {"mfrac": 2, "msub": 2, "msup": 2, "msubsup": 3, "munder": 2, "mover": 2, "munderover": 3, "mroot": 2}
_FUNCTIONS = frozenset(("arccos", "arcsin", "arctan", "cos", "exp", "ln", "log", "max", "min", "sin", "tan"))
_ALPHABETS = {
    "script": {"L": "\N{SCRIPT CAPITAL L}", "N": "\N{MATHEMATICAL SCRIPT CAPITAL N}"},
    "double-struck": {"R": "\N{DOUBLE-STRUCK CAPITAL R}"},
}


def to_mathml(latex: str, display: str = "inline") -> str:
    """MathML of a formula."""
    latex = latex.strip()
    for other, name in _SAME:
        latex = other.sub(name, latex)
    try:
        found: str = convert(latex, display=display)
    except Exception as error:  # whatever the converter raises on a formula that it cannot read
        raise PluginError(f"the formula {latex!r} cannot be converted: {type(error).__name__}: {error}") from error
    if "\\" in found:
        unknown = ", ".join(sorted(set(re.findall(r"\\[a-zA-Z]*", found))))
        raise PluginError(f"the formula {latex!r} has what the converter does not know: {unknown}")
    root = ElementTree.fromstring(found.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "", 1))
    for element in root.iter():
        if len(element) != _PARTS.get(element.tag, len(element)):
            raise PluginError(f"the formula {latex!r} lacks a part of its {element.tag[1:]}.")
    _set(root)
    return ElementTree.tostring(root, encoding="unicode")


def _set(element: ElementTree.Element) -> None:
    """Set the formula as TeX would: what follows is left to the browser by the converter, and comes out wrong there."""
    for child in element:
        _set(child)
        letters = _ALPHABETS.get(child.get("mathvariant", ""))
        if letters and child.text in letters:  # browsers have given up the attribute
            child.text = letters[child.text]
            del child.attrib["mathvariant"]
        if child.tag == "mo" and child.text in ("|", "\N{DOUBLE VERTICAL LINE}"):  # a bracket, not an operator
            child.set("lspace", "0")
            child.set("rspace", "0")
        if child.tag == "mo" and child.text in _FUNCTIONS:
            child.tag = "mi"
    for place in range(len(element) - 1, -1, -1):
        child = element[place]
        before = element[place - 1] if place else None
        after = element[place + 1] if place + 1 < len(element) else None
        if child.tag == "mo" and child.text == "\N{MINUS SIGN}" and element.tag == "mrow":
            sign = (
                before is None or (before.tag == "mo" and before.text not in (")", "]", "|")) or before.tag == "mspace"
            )
            child.set("form", "prefix" if sign else "infix")
        if element.tag in ("mrow", "math") and _is_function(child):
            if after is not None and after.tag not in ("mo", "mspace"):
                element.insert(place + 1, ElementTree.Element("mspace", width="0.17em"))
            if before is not None and before.tag not in ("mo", "mspace", "munder", "munderover"):
                element.insert(place, ElementTree.Element("mspace", width="0.17em"))


def _is_function(element: ElementTree.Element) -> bool:
    if element.tag in ("msub", "munder") and len(element):
        element = element[0]
    return element.tag == "mi" and element.text in _FUNCTIONS


def _replace(match: re.Match[str]) -> str:
    if match["inline"] is not None:
        return to_mathml(html.unescape(match["inline"]))
    return f'<div class="formula">{to_mathml(html.unescape(match["display"]), "block")}</div>'


def on_page_content(content: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page."""
    return _FOUND.sub(_replace, content)
