"""The source of functions and classes in a form that is equal in every version of Python.

Bytecode differs between versions of Python, and so does the syntax tree that `ast.dump` prints. Tokens do
not: a function counts by those of its source, without comments, docstrings and layout. That the source found
is that of the function at hand is checked by compiling it again here, since a file may have been edited
after it was imported.
"""

import ast
import copy
import functools
import inspect
import io
import linecache
import symtable
import sys
import tokenize
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}
_STARTS = {getattr(tokenize, name) for name in ("FSTRING_START", "TSTRING_START") if hasattr(tokenize, name)}
_ENDS = {getattr(tokenize, name) for name in ("FSTRING_END", "TSTRING_END") if hasattr(tokenize, name)}

Place = tuple[int, int]


@dataclass(frozen=True)
class Source:
    """What the source of a function or class says.

    Attributes:
        tokens: its tokens.
        globals: the names in it that are looked up among the globals of its module, sorted.
        attributes: the names of attributes in it, sorted.
    """

    tokens: tuple[str, ...]
    globals: tuple[str, ...]
    attributes: tuple[str, ...]


def source_of(function: types.FunctionType) -> Source | None:
    """The source of a function; None if it is not available, or is not that which was compiled."""
    code = function.__code__
    return _function_source(code, _text(code.co_filename, function.__globals__))


def class_source(kind: type) -> Source | None:
    """The source of a class statement; None if it is not available."""
    functions = [
        f
        for f in map(_plain, vars(kind).values())
        if f and f.__globals__.get("__name__") == kind.__module__
        and f.__qualname__ == f"{kind.__qualname__}.{f.__name__}"
        and f.__code__.co_filename != "<string>"  # as by a dataclass
    ]  # fmt: skip
    inside = [f.__code__ for f in functions]
    if functions:
        file, globals_ = functions[0].__code__.co_filename, functions[0].__globals__
    else:
        globals_ = vars(sys.modules.get(kind.__module__, types.ModuleType("")))
        file = globals_.get("__file__") or ""
    parsed = _parsed(_text(file, globals_))
    if parsed is None or not all(_function_source(code, parsed.text) for code in inside):
        return None
    path = [name for name in kind.__qualname__.split(".") if name != "<locals>"]
    lines = [code.co_firstlineno for code in inside]
    found = [
        node
        for node in _classes(parsed.tree, path)
        if all(_first_line(node) <= line <= _last_line(node) for line in lines)
    ]
    sources = {_source(parsed, node) for node in found}
    return sources.pop() if len(sources) == 1 else None


@dataclass(frozen=True)
class _Parsed:
    text: str
    tree: ast.Module
    code: types.CodeType
    tokens: list[tokenize.TokenInfo]


def _plain(attribute: Any) -> types.FunctionType | None:
    for name in ("__func__", "fget", "func"):
        attribute = getattr(attribute, name, attribute)
    return attribute if isinstance(attribute, types.FunctionType) else None


def _text(file: str, globals_: dict[str, Any]) -> str:
    linecache.checkcache(file)
    return "".join(linecache.getlines(file, globals_))


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> _Parsed | None:
    if not text:
        return None
    try:
        tree = ast.parse(text)
        code = compile(text, "", "exec", dont_inherit=True)
        return _Parsed(text, tree, code, list(tokenize.generate_tokens(io.StringIO(text).readline)))
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
        return None


@functools.lru_cache(maxsize=4096)
def _function_source(code: types.CodeType, text: str) -> Source | None:
    parsed = _parsed(text)
    if parsed is None or not any(_is_same(code, other) for other in _codes(parsed.code)):
        return None
    name, line = code.co_name, code.co_firstlineno
    found = [
        node
        for node in ast.walk(parsed.tree)
        if isinstance(node, _Function)
        and (getattr(node, "name", "<lambda>"), _first_line(node)) == (name, line)
    ]
    if len(found) > 1:  # several lambdas in a line
        where = [place for place in code.co_positions() if None not in place and place[2:] != (0, 0)]
        found = [node for node in found if all(_holds(node, place) for place in where)]
        found = [node for node in found if _shape(node) == _lambda_shape(code)]
    sources = {_source(parsed, node) for node in found}
    return sources.pop() if len(sources) == 1 else None


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    for item in code.co_consts:
        if isinstance(item, types.CodeType):
            yield item
            yield from _codes(item)


def _is_same(code: types.CodeType, other: types.CodeType) -> bool:
    """Whether two pieces of code do the same and stand in the same line."""

    def shape(item: types.CodeType) -> tuple[Any, ...]:
        constants = tuple(shape(c) if isinstance(c, types.CodeType) else _constant(c) for c in item.co_consts)
        return (item.co_name, item.co_firstlineno, item.co_code, item.co_names, item.co_varnames, constants)

    return (code.co_name, code.co_firstlineno) == (other.co_name, other.co_firstlineno) and (
        shape(code) == shape(other)
    )


def _constant(value: Any) -> Any:
    """A constant such that True, 1 and 1.0 differ, and nan equals itself."""
    if isinstance(value, tuple):
        return tuple(map(_constant, value))
    if isinstance(value, frozenset):
        return frozenset(map(_constant, value))
    return type(value), repr(value)


def _first_line(node: Any) -> int:
    return min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", ()))])


def _last_line(node: Any) -> int:
    return node.end_lineno


def _holds(node: _Function, place: tuple[Any, ...]) -> bool:
    line, end_line, column, end_column = place
    end = node.end_lineno or 0, node.end_col_offset or 0  # which every parsed node has
    return (node.lineno, node.col_offset) <= (line, column) and (end_line, end_column) <= end


def _shape(node: _Function) -> tuple[list[str], int]:
    """The names of a lambda's arguments, and how many lambdas are in it."""
    given = node.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    rest = [item for item in (given.vararg, given.kwarg) if item is not None]
    bodies = node.body if isinstance(node.body, list) else [node.body]
    inside = sum(isinstance(item, ast.Lambda) for body in bodies for item in ast.walk(body))
    return [item.arg for item in [*arguments, *rest]], inside


def _lambda_shape(code: types.CodeType) -> tuple[list[str], int]:
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return list(code.co_varnames[:count]), sum(item.co_name == "<lambda>" for item in _codes(code))


def _classes(tree: ast.AST, path: list[str]) -> Iterator[ast.ClassDef]:
    """The class statements at a dotted path of classes and functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and path == [node.name]:
            yield node
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _classes(node, path)
        elif len(path) > 1 and node.name == path[0]:
            yield from _classes(node, path[1:])


def _source(parsed: _Parsed, node: Any) -> Source:
    lines = parsed.text.splitlines(keepends=True)

    def characters(line: int, column: int) -> Place:
        return line, len(lines[line - 1].encode()[:column].decode())

    first = min([(node.lineno, node.col_offset), *_decorator_starts(node, parsed)])
    start, stop = characters(*first), characters(node.end_lineno, node.end_col_offset)
    tokens = tuple(_tokens(parsed.tokens, lines, start, stop))
    attributes = {item.attr for item in ast.walk(node) if isinstance(item, ast.Attribute)}
    return Source(tokens, tuple(sorted(_globals(node))), tuple(sorted(attributes)))


def _decorator_starts(node: Any, parsed: _Parsed) -> list[Place]:
    """Where the decorators begin, at their @ signs."""
    places = []
    for item in getattr(node, "decorator_list", ()):
        here = item.lineno, item.col_offset
        places.append(
            max([t.start for t in parsed.tokens if t.string == "@" and t.start <= here], default=here)
        )
    return places


def _tokens(found: list[tokenize.TokenInfo], lines: list[str], start: Place, stop: Place) -> Iterator[str]:
    """The tokens between two places: strings by their value, f-strings as they are written."""
    kept: list[tuple[int, str]] = []
    begun: list[Place] = []
    for token in found:
        if token.start < start or token.end > stop or token.type in _LAYOUT:
            continue
        if token.type in _STARTS:
            begun.append(token.start)
        elif token.type in _ENDS:
            first = begun.pop()
            if not begun:
                kept.append((tokenize.OP, _between(lines, first, token.end)))
        elif begun:
            continue
        elif token.type == tokenize.NEWLINE:
            kept.append((tokenize.NEWLINE, "\n"))
        elif token.type in (tokenize.INDENT, tokenize.DEDENT):
            if not kept:  # the end of what stands before
                continue
            kept.append((token.type, "\t" if token.type == tokenize.INDENT else "\b"))
        elif token.type == tokenize.STRING:
            kept.append(_string(token.string))
        else:
            kept.append((token.type, token.string))
    edges = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    before = tokenize.NEWLINE
    for number, (kind, text) in enumerate(kept):
        after = kept[number + 1][0] if number + 1 < len(kept) else tokenize.NEWLINE
        if kind == tokenize.STRING and before in edges and after == tokenize.NEWLINE:
            continue  # a docstring
        if kind == tokenize.NEWLINE and before in edges:
            continue  # its end
        yield text
        before = kind


def _string(text: str) -> tuple[int, str]:
    prefix = text[: min(place for place in (text.find("'"), text.find('"')) if place >= 0)]
    if "f" in prefix.lower():  # one token up to Python 3.11
        return tokenize.OP, text
    return tokenize.STRING, ascii(ast.literal_eval(text))


def _between(lines: list[str], start: Place, stop: Place) -> str:
    if start[0] == stop[0]:
        return lines[start[0] - 1][start[1] : stop[1]]
    middle = lines[start[0] : stop[0] - 1]
    return "".join([lines[start[0] - 1][start[1] :], *middle, lines[stop[0] - 1][: stop[1]]])


def _globals(node: Any) -> set[str]:
    """The names that a function or class looks up outside of itself, closures included."""
    node = _Unannotated().visit(copy.deepcopy(node))  # annotations are looked up in other ways since 3.14
    alone = ast.Module([ast.Expr(node) if isinstance(node, ast.Lambda) else node], [])
    table = symtable.symtable(ast.unparse(ast.fix_missing_locations(alone)), "", "exec")
    found: set[str] = set()

    def visit(scope: symtable.SymbolTable) -> None:
        if str(getattr(scope.get_type(), "value", scope.get_type())) in ("function", "class"):
            found.update(s.get_name() for s in scope.get_symbols() if s.is_global() and s.is_referenced())
            for inner in scope.get_children():
                visit(inner)
        elif scope is table:
            for inner in scope.get_children():
                visit(inner)

    visit(table)
    return found


class _Unannotated(ast.NodeTransformer):
    """Takes the annotations out of a piece of code."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        value = ast.Constant(None) if node.value is None else self.visit(node.value)
        return ast.Assign([self.visit(node.target)], value)
