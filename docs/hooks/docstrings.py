"""The docstrings' reStructuredText (formulas, roles, literal blocks, doctests) as Markdown, for mkdocstrings."""

from __future__ import annotations

import html
import re
import textwrap
from typing import Any

import griffe

_MATH_BLOCK = re.compile(
    r"^(?P<indent>[ ]*)\.\. math::[ ]*(?P<first>[^\n]*)(?P<rest>(?:\n(?P=indent)[ ]+\S[^\n]*)*)", re.MULTILINE
)
_MATH_ROLE = re.compile(r":math:`([^`]+)`")
_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc|obj):`(~?)([^`]+)`")
_DOCTEST = re.compile(r"^(?P<indent>[ ]*)>>> [^\n]*(?:\n(?P=indent)\S[^\n]*)*", re.MULTILINE)
_LITERAL = re.compile(r"(?<=\w)::$", re.MULTILINE)


def _formula(match: re.Match[str]) -> str:
    text = " ".join([match["first"], *match["rest"].split("\n")])
    indent = match["indent"]
    return f"\n{indent}$$\n{indent}{' '.join(text.split())}\n{indent}$$\n"


def _fenced(match: re.Match[str]) -> str:
    indent = match["indent"]
    lines = textwrap.dedent(match[0])
    return textwrap.indent(f"\n```pycon\n{lines}\n```\n", indent)


def _link(obj: griffe.Object, match: re.Match[str]) -> str:
    short, name = match.groups()
    first, dot, rest = name.partition(".")
    try:
        target = name if first == obj.package.name else obj.resolve(first) + dot + rest
    except griffe.NameResolutionError:
        target = name
    text = html.escape(name.rpartition(".")[2] if short else name)
    # optional: what is not on a page of the reference stays a name
    return f'<autoref identifier="{html.escape(target)}" optional><code>{text}</code></autoref>'


def to_markdown(text: str, obj: griffe.Object) -> str:
    """The text of a docstring, rewritten."""
    text = _MATH_BLOCK.sub(_formula, text)
    text = _MATH_ROLE.sub(lambda match: "$" + " ".join(match[1].split()) + "$", text)
    text = _ROLE.sub(lambda match: _link(obj, match), text)
    text = _DOCTEST.sub(_fenced, text)
    return _LITERAL.sub(":", text)


def _default(parameter: griffe.Parameter, obj: griffe.Object) -> str | griffe.Expr | None:
    """The value behind a default that is written as a field of a configuration, ``_D.tau``."""
    written = parameter.default
    if not isinstance(written, griffe.ExprAttribute) or not str(written).startswith("_D"):
        return written
    name, _, field = str(written).partition(".")
    made = obj.module[name].value
    assert isinstance(made, griffe.ExprCall), f"{name} of {obj.module.path} is no configuration"
    found = obj.modules_collection[made.canonical_path][field].value
    if isinstance(found, griffe.ExprCall) and str(found.function) == "Field":
        (found,) = [
            argument.value
            for argument in found.arguments
            if isinstance(argument, griffe.ExprKeyword) and argument.name == "default"
        ]
    return found


class Markdown(griffe.Extension):
    """Called by griffe with each object when its package has been read."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite every docstring of the package, and the defaults that stand in the configurations."""
        self._walk(pkg)

    def _walk(self, obj: griffe.Object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value, obj)
        if isinstance(obj, griffe.Function):
            for parameter in obj.parameters:
                parameter.default = _default(parameter, obj)
        for member in obj.members.values():
            if isinstance(member, griffe.Object):
                self._walk(member)
