"""The layout and the house style of the repository, checked by parsing it; each rule is shown to catch a violation
first.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import source_rules as rules

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "neox").glob("**/*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
NATIVE_SUFFIXES = {".h", ".cpp", ".cuh", ".cu"}

# The exception to the sizes: an operator's function and fake kernel take what its schema has.
SCHEMAS = ("neox/ops/",)
SMALL = 40  # lines: a module below this may be tested with its neighbours


def native_sources(*folders: str) -> list[Path]:
    """The C++ and CUDA files below the folders, by suffix: a Python script next to them leaves bytecode there."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*"))]
    return [path for path in paths if path.suffix in NATIVE_SUFFIXES]


def found(rule, *modules: str) -> list[str]:
    """`file:line what` of a rule over all modules (or those given)."""
    rows = []
    for name in modules or MODULES:
        path = MODULES[name].relative_to(ROOT)
        rows += [f"{path}:{line} {what}" for line, what in rule(name)]
    return rows


def test_every_package_has_a_floor():
    packages = {rules.package_of(name) for name in MODULES if name != "neox"}
    assert packages <= set(rules.FLOORS)


def test_packages_import_lower_floors_only():
    assert found(lambda name: rules.floor_violations(TREES[name], name)) == []


def test_wings_of_data_import_earlier_wings_only():
    assert found(lambda name: rules.wing_violations(TREES[name], name)) == []
    assert list(
        rules.wing_violations(ast.parse("from neox.data.samples.order import Sample"), "neox.data.text.encoding")
    )
    assert list(rules.wing_violations(ast.parse("from neox.data.text import reading"), "neox.data.store.indexed"))
    assert not list(
        rules.wing_violations(
            ast.parse("from neox.data.store.indexed import IndexedDataset"), "neox.data.text.encoding"
        )
    )


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("neox.config.load", "import torch"),
        ("neox.config.load", "from neox.data import IndexedDataset"),
        ("neox.data.store.indexed", "import torch"),
        ("neox.data.store.indexed", "from neox import ops"),
        ("neox.model.gpt", "from ..checkpoint import save"),
        ("neox.model.gpt", "def f():\n    import neox.engine.engine"),
        ("neox.train.loop", "import deepspeed"),
        ("neox.errors", "import neox.config"),
    ],
)
def test_a_wrong_floor_is_seen(module, source):
    assert list(rules.floor_violations(ast.parse(source), module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("neox.data.samples.loader", "import torch"),
        ("neox.config.load", "from neox.errors import ConfigError\nfrom neox.config.schema import Config"),
        ("neox.engine.engine", "import deepspeed\nfrom neox.model.gpt import GPT"),
    ],
)
def test_a_right_floor_passes(module, source):
    assert list(rules.floor_violations(ast.parse(source), module)) == []


def test_no_import_cycles():
    graph = {
        name: {
            target
            for _, target in rules.imported_modules(
                tree, name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
            )
            if target in MODULES and target != name
        }
        for name, tree in TREES.items()
    }
    assert rules.cycles(graph) == []


def test_a_cycle_is_seen():
    assert rules.cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert rules.cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


PEERS = {"benchmarks/checkpoint/bench_checkpoint.py": "torch.save writes pickle"}  # what a benchmark compares with
SHIPPED = [
    path
    for pattern in ("neox/**/*.py", "benchmarks/**/*.py", "demo/*.py", "examples/*.py", "docs/*.py", "*.py")
    for path in sorted(ROOT.glob(pattern))
]


@pytest.mark.parametrize("rule", [rules.forbidden_calls, rules.forbidden_statements], ids=lambda rule: rule.__name__)
def test_nothing_forbidden_is_shipped(rule):
    found = [
        (str(path.relative_to(ROOT)), line, what)
        for path in SHIPPED
        for line, what in rule(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert [f"{path}:{line} {what}" for path, line, what in found if PEERS.get(path) != what] == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec(text)",
        "import os\nos.system('ls')",
        "subprocess.run(x, shell=True)",
        "subprocess.run(x, shell=flag)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "torch.load(path)",
        "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "archive.extractall(path)",
        "getattr(config.model, 'x', None)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_a_forbidden_call_is_seen(source):
    assert list(rules.forbidden_calls(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    global x",
        "from a import *",
        "try:\n    f()\nexcept:\n    g()",
        "def f(**kwargs):\n    g(**kwargs)",
    ],
)
def test_a_forbidden_statement_is_seen(source):
    assert list(rules.forbidden_statements(ast.parse(source)))


def test_pickles_are_read_in_one_module_alone():
    assert [row.split(":")[0] for row in found(lambda name: rules.torch_loads(TREES[name]))] == [
        "neox/convert/pickles.py"
    ]


def test_only_the_command_line_reads_argv_and_the_environment():
    assert found(lambda name: () if name.startswith("neox.cli") else rules.environment_reads(TREES[name])) == []
    assert list(rules.environment_reads(ast.parse("import os\nos.environ['A']")))
    assert list(rules.environment_reads(ast.parse("from os import environ")))
    assert not list(rules.environment_reads(ast.parse("import os\nos.environ['A'] = '1'")))


def test_no_function_imports_our_own_modules():
    assert found(lambda name: () if name.startswith("neox.cli.") else rules.local_imports(TREES[name])) == []
    assert list(rules.local_imports(ast.parse("def f():\n    from neox.model import gpt")))


def test_no_module_level_state_is_changed():
    assert found(lambda name: rules.mutable_state(TREES[name])) == []
    assert list(rules.mutable_state(ast.parse("CACHE = {}\ndef f(x):\n    CACHE[x] = 1")))
    assert list(rules.mutable_state(ast.parse("SEEN = []\ndef f(x):\n    SEEN.append(x)")))
    assert not list(rules.mutable_state(ast.parse("SEEN = []\ndef f(SEEN):\n    SEEN.append(1)")))


def test_everything_public_has_a_docstring():
    assert found(lambda name: rules.missing_docstrings(TREES[name])) == []
    assert (
        len(list(rules.missing_docstrings(ast.parse("def f():\n    pass\nclass A:\n    def g(self):\n        pass"))))
        == 4
    )


def test_sections_of_docstrings_are_lists():
    assert found(lambda name: rules.broken_sections(TREES[name])) == []
    wrapped = '"""Sum.\n\nArgs: x: one term. y: the other.\n"""'
    outdented = '"""Sum.\n\nRaises:\n    ValueError: x is negative,\nor y is.\n"""'
    assert [len(list(rules.broken_sections(ast.parse(text)))) for text in (wrapped, outdented)] == [1, 1]
    assert not list(rules.broken_sections(ast.parse('"""Sum.\n\nArgs:\n    x: one term.\n"""')))


def excused(row: str) -> bool:
    """Whether a finding of the sizes is one of the exceptions."""
    site, _, what = row.partition(" ")
    path = site.split(":")[0]
    return path.startswith(SCHEMAS) and what.endswith("parameters")


def test_functions_classes_and_files_are_of_readable_size():
    rows = found(lambda name: rules.sizes(TREES[name], MODULES[name].read_text(encoding="utf-8")))
    for path in native_sources("csrc", "tests/cpp", "tests/emu"):
        count = path.read_text(encoding="utf-8").count("\n")
        if count > rules.FILE_LINES:
            rows.append(f"{path.relative_to(ROOT)}:1 file of {count} lines")
    for folder in ("tests", "benchmarks", "examples"):  # their functions may take more parameters
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            sizes = rules.sizes(ast.parse(text), text)
            rows += [f"{path.relative_to(ROOT)}:{line} {what}" for line, what in sizes if what.endswith("lines")]
    assert [row for row in rows if not excused(row)] == []


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("def f():\n" + "    pass\n" * 60, "f of 61 lines"),
        ("class A:\n" + "    x = 1\n" * 200, "class A of 201 lines"),
        ("class A:\n    def f(self, a, b, c, d, e, *, g, h, i, j):\n        pass", "f of 9 parameters"),
        (
            "class A:\n    def f(self):\n" + "".join(f"        self.x{i} = 1\n" for i in range(16)),
            "class A of 16 attributes",
        ),
    ],
)
def test_an_excess_is_seen(source, what):
    assert what in [found for _, found in rules.sizes(ast.parse(source), "")]


def test_any_is_rare():
    assert sum(rules.uses_of_any(tree) for tree in TREES.values()) <= rules.ANY
    assert rules.uses_of_any(ast.parse("from typing import Any\ndef f(x: dict[str, Any]) -> Any: pass")) == 2


def test_no_code_in_comments():
    rows = [
        f"{path.relative_to(ROOT)}:{line} {what}"
        for path in SHIPPED
        for line, what in rules.code_in_comments(path.read_text(encoding="utf-8"))
    ]
    assert rows == []
    assert list(rules.code_in_comments("# x = f(1)\n"))


def test_no_vague_file_names():
    names = [
        path.relative_to(ROOT)
        for folder in ("neox", "csrc", "tests", "benchmarks")
        for path in (ROOT / folder).glob("**/*")
        if path.stem in rules.VAGUE_NAMES and path.is_file()
    ]
    assert names == []


def test_every_module_has_a_test_file_of_its_name():
    missing = []
    for name, path in MODULES.items():
        if path.name == "__init__.py" or path.read_text(encoding="utf-8").count("\n") < SMALL:
            continue
        folder = ROOT / "tests" / path.relative_to(ROOT / "neox").parent
        if not any((folder / f"test_{stem}.py").exists() for stem in (path.stem, path.stem.removeprefix("_"))):
            missing.append(name)
    assert missing == []


def test_an_operator_is_a_closed_list_of_files():
    missing = []
    for folder in sorted((ROOT / "csrc" / "ops").iterdir()):
        op = folder.name
        kernels = f"csrc/ops/{op}/cpu/{op}_cpu.cpp" if (folder / "cpu").is_dir() else f"csrc/ops/{op}/{op}_cpu.cpp"
        native = [f"csrc/ops/{op}/{op}.h", kernels, f"csrc/ops/{op}/{op}.cpp"]
        missing += [
            file
            for file in (*native, f"neox/ops/{op}.py", f"tests/ops/test_{op}.py", f"benchmarks/ops/bench_{op}.py")
            if not (ROOT / file).exists()
        ]
    assert missing == []


def test_operator_kernels_and_headers_know_no_torch():
    bindings = {path for path in native_sources("csrc/ops") if path.name == f"{path.parent.name}.cpp"}
    rows = []
    for path in native_sources("csrc/ops", "csrc/data"):
        text = path.read_text(encoding="utf-8")
        if path not in bindings and ("<torch/" in text or "ATen" in text):
            rows.append(str(path.relative_to(ROOT)))
    assert rows == []


def test_bindings_ask_the_kernels_files_with_the_tensors_device_current():
    """NEOX_RUN and NEOX_QUERY set it. A plain call would size a workspace by another GPU where the current one is
    not the tensor's.
    """
    rows = []
    for path in sorted((ROOT / "csrc" / "ops").glob("*/*.cpp")):
        if path.name == f"{path.parent.name}.cpp":
            rows += [f"{path.name}: {name}" for name in re.findall(r"\b(\w+_cuda)\(", path.read_text())]
    assert rows == []


HEAVY = ("torch", "deepspeed", "pydantic", "numpy", "yaml", "transformers", "safetensors")


def test_import_is_light():
    """`import neox` brings in none of the slow packages: well below 0.3 s on any machine."""
    probe = f"import neox, sys; print([name for name in {HEAVY} if name in sys.modules], len(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[] "), done.stdout


def test_the_command_line_is_light():
    """`neox --help` answers in the time of Python's own start."""
    heavy = (*HEAVY, "orjson", "neox.config")
    probe = f"import neox.cli.main, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_preprocess_starts_without_numpy():
    """`neox preprocess --help` would take a third longer; a run imports numpy while the first blocks are encoded."""
    probe = "import neox.cli.preprocess, sys; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.stdout == "False\n", done.stdout + done.stderr


def test_the_config_imports_no_torch():
    probe = (
        "import neox.config.load, neox.config.validate, neox.config.explain, neox.cli.config, sys; print('torch' in "
        "sys.modules, 'deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.stdout == "False False\n", done.stderr


def test_commands_that_print_json_import_no_deepspeed():
    """DeepSpeed writes to the standard output when it is imported, ahead of the JSON."""
    probe = "import neox.cli.evaluate, neox.cli.generate, neox.cli.export, sys; print('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.stdout == "False\n", done.stdout + done.stderr


def test_everything_imports_without_network_or_compiler():
    """All modules of the package, in a process whose sockets raise and whose PATH is empty; deepspeed's engine is
    imported too.
    """
    probe = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise OSError('network used at import')\n"
        "socket.socket.connect = refuse; socket.create_connection = refuse; socket.getaddrinfo = refuse\n"
        "import importlib\n"
        f"for name in {sorted(MODULES)!r}: importlib.import_module(name)\n"
        "print('imported')"
    )
    environment = {"PATH": "", "HOME": "/nonexistent", "CUDA_HOME": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=180, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("imported")
