"""Rules of house style as functions over source text: each yields (line, what). tests/test_layout.py applies them to
the repository.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

FLOORS = {
    "neox.cpu": 0,
    "neox.errors": 0,
    "neox.phases": 0,
    "neox.files": 0,
    "neox.printing": 0,
    "neox.targets": 0,
    "neox._native": 0,
    "neox.config": 0,
    "neox.ops": 1,
    "neox.data": 1,
    "neox.parallel": 2,
    "neox.model": 3,
    "neox.checkpoint": 3,
    "neox.convert": 4,
    "neox.engine": 4,
    "neox.runtime": 4,
    "neox.testing": 4,
    "neox.generate": 4,
    "neox.evaluate": 5,
    "neox.plan": 5,
    "neox.report": 5,
    "neox.train": 6,
    "neox.cli": 7,
}
WINGS = ("neox.data.store", "neox.data.text", "neox.data.samples")  # each may import those before it
GROUND = ("neox.errors", "neox.files", "neox.printing")  # the others of floor 0 may import these
SERIALISERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {  # dotted call -> why not
    "eval": "runs text as code",
    "exec": "runs text as code",
    "os.system": "goes through a shell",
    "os.popen": "goes through a shell",
    "yaml.load": "may construct objects",
    "yaml.unsafe_load": "constructs objects",
    "yaml.full_load": "may construct objects",
    "torch.load": "reads pickle",
    "torch.save": "writes pickle",
}
ENVIRONMENT = {"os.environ", "os.getenv", "os.putenv", "sys.argv", "os.environb"}
MUTATORS = {
    "append",
    "extend",
    "insert",
    "add",
    "update",
    "setdefault",
    "pop",
    "popitem",
    "remove",
    "discard",
    "clear",
    "sort",
}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "misc", "common", "stuff", "tools"}
FUNCTION_LINES = 60
FILE_LINES = 500
CLASS_LINES = 200
PARAMETERS = 8  # self and cls apart
ATTRIBUTES = 15  # of self, assigned in methods
ANY = 6  # uses of Any in the package, all at its boundaries; only shrinks

Finding = tuple[int, str]


def dotted(node: ast.AST) -> str:
    """`a.b.c` for a chain of names, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, relative ones resolved against `package`; `from a import b` gives a and
    a.b.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def package_of(module: str) -> str:
    """The part of the layout a module belongs to: `neox.config.load` -> `neox.config`."""
    return module_prefix(module, 2)


def module_prefix(module: str, parts: int) -> str:
    """The first parts of a dotted name."""
    return ".".join(module.split(".")[:parts])


def floor_violations(tree: ast.AST, module: str) -> Iterator[Finding]:
    """Imports of the same or a higher floor, of torch where it is not allowed, of deepspeed outside the engine."""
    package = package_of(module)
    for line, name in imported_modules(tree, module.rpartition(".")[0]):
        target = package_of(name)
        if target in FLOORS and package in FLOORS and target != package and FLOORS[target] >= FLOORS[package]:
            both_ground = FLOORS[target] == FLOORS[package] == 0 and target in GROUND
            if not both_ground:
                yield line, f"{package} (floor {FLOORS[package]}) imports {target} (floor {FLOORS[target]})"
        top = name.split(".")[0]
        if top in ("torch", "deepspeed") and (
            FLOORS.get(package) == 0 or (package == "neox.data" and module != "neox.data.samples.loader")
        ):
            yield line, f"{module} imports {top}"
        if top == "deepspeed" and package != "neox.engine":
            yield line, f"{module} imports deepspeed; only neox.engine may"


def wing_violations(tree: ast.AST, module: str) -> Iterator[Finding]:
    """Imports of a later wing of neox.data by an earlier one."""
    wing = module_prefix(module, 3)
    if wing not in WINGS:
        return
    for line, name in imported_modules(tree, module.rpartition(".")[0]):
        target = module_prefix(name, 3)
        if target in WINGS and WINGS.index(target) > WINGS.index(wing):
            yield line, f"{wing} imports {target}"


def forbidden_calls(tree: ast.AST) -> Iterator[Finding]:
    """Calls and arguments that are forbidden everywhere."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if name in CALLS and not (name == "torch.load" and reads_weights_only(node)):
            yield node.lineno, f"{name} {CALLS[name]}"
        if name.endswith(".extractall"):
            yield node.lineno, "extractall trusts the archive's paths"
        if name == "getattr" and len(node.args) == 3 and "config" in dotted(node.args[0]).lower():
            yield node.lineno, "getattr with a default on a config"
        for keyword in node.keywords:
            if keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            ):
                yield node.lineno, f"{keyword.arg}="


def reads_weights_only(call: ast.Call) -> bool:
    """`torch.load(..., weights_only=True)`: builds tensors and plain values only."""
    return any(
        keyword.arg == "weights_only" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True
        for keyword in call.keywords
    )


def torch_loads(tree: ast.AST) -> Iterator[Finding]:
    """Every torch.load, safe or not: only the import of old checkpoints may have one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) == "torch.load":
            yield node.lineno, "torch.load"


def forbidden_statements(tree: ast.AST) -> Iterator[Finding]:
    """global, star imports, bare except, serialisers that run code, `**kwargs` passed through."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield node.lineno, "global"
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "bare except"
        elif isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            yield node.lineno, "import *"
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and passes_keywords_through(node):
            yield node.lineno, f"**{node.args.kwarg.arg} passed through by {node.name}"
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        yield from ((node.lineno, f"import {name}") for name in names if name.split(".")[0] in SERIALISERS)


def passes_keywords_through(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function hands its `**kwargs` on to another call."""
    if function.args.kwarg is None:
        return False
    name = function.args.kwarg.arg
    unpacked = [
        keyword.value
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg is None
    ]
    return any(isinstance(value, ast.Name) and value.id == name for value in unpacked)


def environment_reads(tree: ast.AST) -> Iterator[Finding]:
    """Reads of argv and the environment; setting a variable for a library is no read."""
    written = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node) in ENVIRONMENT and id(node) not in written:
            yield node.lineno, dotted(node)
        elif isinstance(node, ast.ImportFrom) and any(
            f"{node.module}.{alias.name}" in ENVIRONMENT for alias in node.names
        ):
            yield node.lineno, f"from {node.module} import ..."


def local_imports(tree: ast.AST) -> Iterator[Finding]:
    """Imports of our own modules inside functions: below the command line, which delays torch, they hide a cycle."""
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    names = (
                        [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "."]
                    )
                    yield from (
                        (node.lineno, f"{name} imported in {function.name}")
                        for name in names
                        if name.split(".")[0] in ("neox", "")
                    )


def mutable_state(tree: ast.Module) -> Iterator[Finding]:
    """Module-level names that functions of the module change in place."""
    constants = {}
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(
                node.value, (ast.Dict, ast.List, ast.Set, ast.Call, ast.DictComp, ast.ListComp, ast.SetComp)
            ):
                constants[target.id] = node.lineno
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        own = {
            argument.arg for argument in [*function.args.args, *function.args.kwonlyargs, *function.args.posonlyargs]
        }
        own |= {
            name.id for name in ast.walk(function) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
        }
        for node in ast.walk(function):
            changed = None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
                changed = dotted(node.func.value)
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
                changed = dotted(node.value)
            if changed in constants and changed not in own:
                yield node.lineno, f"{changed} is module-level state changed in {function.name}"


def missing_docstrings(tree: ast.Module) -> Iterator[Finding]:
    """The module, public functions, public classes and their public methods without a docstring."""
    if ast.get_docstring(tree) is None:
        yield 1, "module without a docstring"
    for node in public_definitions(tree.body):
        if ast.get_docstring(node) is None:
            yield node.lineno, f"{node.name} without a docstring"
        if isinstance(node, ast.ClassDef):
            for method in public_definitions(node.body):
                if ast.get_docstring(method) is None and not is_declaration(method):
                    yield method.lineno, f"{node.name}.{method.name} without a docstring"


SECTION = re.compile(r"(?:Args|Attributes|Raises|Returns|Yields):(?P<rest>.*)")


def broken_sections(tree: ast.Module) -> Iterator[Finding]:
    """Sections of docstrings that a formatter has wrapped into a paragraph, or whose entries are not indented."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
            heading, *entries = paragraph.split("\n")
            section = SECTION.fullmatch(heading)
            if section and (": " in section["rest"] or any(not entry.startswith("    ") for entry in entries)):
                yield getattr(node, "lineno", 1), f"section {heading.split(':')[0]} of a docstring is not a list"


def public_definitions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Functions and classes of a body whose names are public."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node


def is_declaration(method: ast.stmt) -> bool:
    """Whether a method has no body but `...`, as in a Protocol, whose docstring speaks for it."""
    body = method.body
    return (
        len(body) == 1
        and isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant)
        and body[0].value.value is ...
    )


def sizes(tree: ast.AST, text: str) -> Iterator[Finding]:
    """Files, functions and classes that are too long, parameter lists and sets of attributes that are too large."""
    count = text.count("\n")
    if count > FILE_LINES:
        yield 1, f"file of {count} lines"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES:
                yield node.lineno, f"{node.name} of {length} lines"
            if parameters(node) > PARAMETERS:
                yield node.lineno, f"{node.name} of {parameters(node)} parameters"
        elif isinstance(node, ast.ClassDef):
            length = node.end_lineno - node.lineno + 1
            if length > CLASS_LINES:
                yield node.lineno, f"class {node.name} of {length} lines"
            if len(attributes(node)) > ATTRIBUTES:
                yield node.lineno, f"class {node.name} of {len(attributes(node))} attributes"


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many arguments a function takes, self and cls apart."""
    arguments = function.args
    return sum(
        each.arg not in ("self", "cls") for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    )


def attributes(node: ast.ClassDef) -> set[str]:
    """Names of self that the methods of a class assign."""
    stored = (
        child for child in ast.walk(node) if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store)
    )
    return {child.attr for child in stored if dotted(child.value) == "self"}


def uses_of_any(tree: ast.AST) -> int:
    """How often annotations and casts name Any."""
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree))


def code_in_comments(text: str) -> Iterator[Finding]:
    """Comment lines that are Python statements: commented-out code."""
    for number, line in enumerate(text.splitlines(), 1):
        body = line.strip()
        if not body.startswith("# "):
            continue
        try:
            statement = ast.parse(body[2:].strip()).body
        except SyntaxError:
            continue
        if (statement and isinstance(statement[0], (ast.Assign, ast.Import, ast.ImportFrom, ast.Return))) or (
            statement and is_call(statement[0])
        ):
            yield number, f"commented-out code: {body[:60]}"


def is_call(statement: ast.stmt) -> bool:
    """Whether a statement is a bare call."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Import cycles: the strongly connected components of more than one module (Tarjan), and modules that import
    themselves.
    """
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = []
            while not component or component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1 or node in graph.get(node, ()):
                found.append(sorted(component))

    for each in sorted(graph):
        if each not in index:
            visit(each)
    return found
