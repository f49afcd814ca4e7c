"""The remote-code file: the model in one module that needs torch and transformers alone, made of our sources.

Every definition is copied as it stands, in the order of imports, without a second version of the model to maintain.
Only the checked configurations, which are pydantic's, become plain classes of the same fields and properties.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterable, Iterator

FILE = "modeling_qlip.py"

WHOLE = (
    "qlip.modeling.indices qlip.modeling.reduce qlip.modeling.attention qlip.modeling.transformer"
    " qlip.modeling.quantizer qlip.modeling.text qlip.modeling.vision"
).split()
"""Modules copied whole."""
SOME = {
    "qlip.modeling.config": ("REFUSAL",),
    "qlip.modeling.initialization": ("initialize_layer",),
    "qlip.modeling.model": ("unit", "contrastive_loss"),
}
"""Definitions copied from a module."""
CONFIGS = "qlip.modeling.config"
THEIRS = ("qlip.hf.config", "qlip.hf.model")
LLAVA = "qlip.hf.llava_code"
"""Copied too for a LLaVA, which needs the tower's model type known when the file is imported."""
UM3 = ("qlip.modeling.indices", "qlip.um3.sequence", "qlip.hf.um3_code")
"""Modules of the file of a UM3, copied whole."""
REPLACED = ("defaults_of", "resolve_known", "Positive", "BOOKKEEPING", "Config")
"""Definitions that the preamble has in a form of its own."""

HEAD = '''"""QLIP for transformers, made by `qlip export --format transformers` from the sources of qlip.

A visual tokenizer aligned with text; Apache-2.0. Do not edit: change qlip and export again.
"""

from __future__ import annotations
'''

UM3_HEAD = '''"""UM3 for transformers, made by `qlip export --format transformers` from the sources of qlip.

One model over text and images; Apache-2.0. Do not edit: change qlip and export again.
"""

from __future__ import annotations
'''

FAULT = '''
class QLIPError(ValueError):
    """A fault that the caller can fix."""
'''

PREAMBLE = (
    FAULT
    + '''

class Config:
    """Fields of a configuration: class attributes are the defaults, and a class as default is a part."""

    def __init__(self, **values: Any) -> None:
        for name, default in fields_of(type(self)).items():
            value = values.get(name, default)
            part = isinstance(default, type)
            setattr(self, name, default.from_dict({} if value is default else value) if part else value)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "") -> Self:
        return cls(**values)


def fields_of(kind: type[Config]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__[:-1]):
        for name, value in vars(base).items():
            if not name.startswith("_") and not isinstance(value, (property, classmethod)):
                found[name] = value
    return found


def defaults_of(kind: type[Config]) -> dict[str, Any]:
    return {name: {} if isinstance(value, type) else value for name, value in fields_of(kind).items()}


def resolve_known(name: Any) -> Any:
    return name
'''
)


def remote_code(llava: bool = False) -> str:
    """Text of the file, for a tokenizer or for a LLaVA."""
    begin = [PREAMBLE.strip("\n"), *_plain_configs(_tree(CONFIGS))]
    modules = (*WHOLE, *SOME, *THEIRS, *[LLAVA] * llava)
    return HEAD + "\n" + _joined(begin, modules, ["register_tower()"] * llava)


def um3_code() -> str:
    """Text of the file of a UM3, whose tokenizer of images has a folder and a file of its own."""
    return UM3_HEAD + "\n" + _joined([FAULT.strip("\n")], UM3, [])


def _joined(body: list[str], modules: Iterable[str], end: list[str]) -> str:
    """Imports and definitions of modules, between other definitions."""
    imports: dict[str, set[str]] = {"typing": {"Any", "Self"}}
    for module in modules:
        tree, source = _tree(module), _source(module)
        chosen = SOME.get(module)
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                _collect(node, imports)
            elif (names := _names(node)) and not names & set(REPLACED) and (chosen is None or names & set(chosen)):
                body.append(_text(source, node))
    text = "\n\n\n".join([*body, *end]) + "\n"
    words = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    return "\n".join(_lines(imports, words)) + "\n\n\n" + text


def _source(module: str) -> str:
    return inspect.getsource(importlib.import_module(module))


def _tree(module: str) -> ast.Module:
    return ast.parse(_source(module))


def _names(node: ast.stmt) -> set[str]:
    """Names that a statement of a module defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets if isinstance(node, ast.Assign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _text(source: str, node: ast.stmt) -> str:
    """Source of a statement, with its decorators and comments."""
    decorators = node.decorator_list if isinstance(node, ast.ClassDef | ast.FunctionDef) else []
    first = min([node.lineno, *(one.lineno for one in decorators)])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])


def _collect(node: ast.Import | ast.ImportFrom, imports: dict[str, set[str]]) -> None:
    """Note the imports of other packages, by module; "" holds whole modules."""
    if isinstance(node, ast.Import):
        imports.setdefault("", set()).update(map(ast.unparse, node.names))
    elif node.module and node.module != "__future__" and node.module.split(".")[0] != "qlip":
        imports.setdefault(node.module, set()).update(map(ast.unparse, node.names))


def _lines(imports: dict[str, set[str]], words: set[str]) -> Iterator[str]:
    """Import statements of names that the file uses."""
    plain = sorted(name for name in imports.get("", ()) if name.split(".")[0] in words)
    yield from (f"import {name}" for name in plain)
    for module in sorted(name for name in imports if name):
        if names := sorted(name for name in imports[module] if name.split(" as ")[-1] in words):
            yield f"from {module} import {', '.join(names)}"


def _plain_configs(tree: ast.Module) -> Iterator[str]:
    """Classes of the configurations with fields and properties alone."""
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name in REPLACED:
            continue
        body: list[ast.stmt] = []
        for inner in node.body:
            if isinstance(inner, ast.AnnAssign) and "ClassVar" not in ast.unparse(inner.annotation):
                body.append(ast.Assign([inner.target], _default(inner), lineno=0))
            elif isinstance(inner, ast.FunctionDef) and "property" in map(ast.unparse, inner.decorator_list):
                body.append(inner)
        bases = [base for base in node.bases if ast.unparse(base) != "BaseModel"]
        plain = ast.ClassDef(node.name, bases, [], body or [ast.Pass()], [])
        yield ast.unparse(ast.fix_missing_locations(plain))


def _default(field: ast.AnnAssign) -> ast.expr:
    """Default of a field; the class of a part, and None for a required value."""
    value, kind = field.value, ast.unparse(field.annotation)
    if isinstance(value, ast.Call):  # Field(default_factory=...)
        return next(word.value for word in value.keywords if word.arg == "default_factory")
    if value is None:
        return ast.Name(kind) if kind.endswith("Config") else ast.Constant(None)
    return value
