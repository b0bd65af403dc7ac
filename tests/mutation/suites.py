"""Which tests are those of a module: the files that begin with its name, and others where these do not hold them."""

from __future__ import annotations

from pathlib import Path

MORE = {
    "neox/ops/_library.py": ("ops/test_library.py",),
    "neox/ops/_seed.py": ("ops/test_seed.py",),
    "neox/parallel/gradients.py": ("parallel/test_linear.py", "model/test_norm.py", "model/test_tensor_parallel.py"),
    "neox/data/blend.py": ("data/samples/test_blend.py",),
    "neox/data/indexed.py": ("data/store/test_indexed.py",),
    "neox/data/tokenizer.py": ("data/text/test_tokenizer.py",),
    "neox/config/rules/conflict.py": ("config/rules/test_rules.py",),
    "neox/config/rules/data.py": ("config/rules/test_rules.py",),
    "neox/config/rules/layout.py": ("config/rules/test_rules.py",),
    "neox/config/rules/model.py": ("config/rules/test_rules.py",),
    "neox/config/rules/training.py": ("config/rules/test_rules.py",),
    "neox/config/schema/base.py": ("config/schema",),
}
DATA = {  # of csrc/data
    "batch": ("samples/test_loader.py", "samples/test_cursor.py"),
    "blend": ("samples/test_blend.py", "samples/test_order.py"),
    "byte_pair": ("text/test_byte_level.py", "text/test_encoding.py"),
    "checksum": ("store/test_core.py", "store/test_sidecar.py"),
    "document_statistics": ("store/test_statistics.py",),
    "encode_threads": ("text/test_encoding.py",),
    "file": ("store",),
    "indexed_dataset": ("store",),
    "indexed_writer": ("store",),
    "json_line": ("text/test_reading.py", "text/test_bad_input.py"),
    "line_encoder": ("text/test_encoding.py", "text/test_bad_input.py"),
    "packing": ("samples/test_packing.py",),
    "sample_index": ("samples/test_order.py", "samples/test_cursor.py"),
    "text_encoder": ("text/test_byte_level.py", "text/test_encoding.py"),
    "unicode": ("text/test_byte_level.py",),
    "xxh3": ("store/test_core.py",),
}


def tests_of(root: Path, module: str) -> list[str]:
    """Test files and folders of a module of neox/ or csrc/, relative to the root."""
    path = Path(module)
    if path.parts[:2] == ("csrc", "data"):
        found = [f"tests/data/{name}" for name in DATA.get(path.stem, ("store", "samples", "text"))]
    elif path.parts[:2] == ("csrc", "ops"):
        found = [f"tests/ops/test_{path.parts[2]}.py"]
    else:
        folder, name = Path("tests", *path.parts[1:-1]), path.stem.removeprefix("_")
        topics = [test.name for test in sorted((root / folder).glob(f"test_{name}_*.py"))]
        topics = [test for test in topics if not (root / path.parent / test.removeprefix("test_")).exists()]
        found = [str(folder / test) for test in (f"test_{name}.py", *topics)]
        found += [f"tests/{test}" for test in MORE.get(module, ())]
    found = [name for name in dict.fromkeys(found) if (root / name).exists()]
    if not found:
        raise SystemExit(f"no tests of {module} are known; name them with --tests, or in {__name__}")
    return found


def native_tests_of(root: Path, module: str) -> list[str]:
    """C++ tests of a file of csrc/data, as names of executables."""
    name = f"test_{Path(module).stem}"
    return (
        [f"{name}_plain"] if (root / "tests" / "cpp" / f"{name}.cpp").exists() and "data" in Path(module).parts else []
    )


def emulated_tests_of(root: Path, module: str) -> list[str]:
    """Operators whose tests on the emulator run a CUDA kernel or header: names for test_ops_check."""
    sources = (root / "tests" / "emu").glob("test_*.cpp")
    operators = [
        path.stem.removeprefix("test_")
        for path in sources
        if "emu_test::Operator registered" in path.read_text(encoding="utf-8")
    ]
    return sorted(op for op in operators if "ops" not in Path(module).parts or op.startswith(Path(module).parts[2]))
