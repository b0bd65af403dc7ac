"""`neox`: selection of the command, and the output and exit codes of errors."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import types

import pytest

from neox.cli import main as cli
from neox.errors import DataError


def install_command(monkeypatch, run) -> None:
    """Register a command `probe` whose run is the given function."""
    module = types.ModuleType("neox_probe_command", "A command for tests.")
    module.add_arguments = lambda parser: parser.add_argument("--number", type=int, default=3)
    module.run = run
    monkeypatch.setitem(sys.modules, "neox_probe_command", module)
    monkeypatch.setitem(cli.COMMANDS, "probe", ("neox_probe_command", "a command for tests"))


def test_runs_the_command_and_returns_its_code(monkeypatch):
    install_command(monkeypatch, lambda args: args.number)
    assert cli.main(["probe", "--number", "7"]) == 7


def test_an_error_is_one_line_and_its_code(monkeypatch, capsys):
    def run(args):
        raise DataError("no such dataset", where="a.idx")

    install_command(monkeypatch, run)
    assert cli.main(["probe"]) == 3
    assert capsys.readouterr().err == "error[3] no such dataset; where=a.idx\n"


@pytest.mark.parametrize("argv", [["--debug", "probe"], ["probe", "--debug"]])
def test_debug_adds_the_traceback(monkeypatch, capsys, argv):
    def run(args):
        raise DataError("no such dataset", where="a.idx")

    install_command(monkeypatch, run)
    assert cli.main(argv) == 3
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("error[3] no such dataset; where=a.idx\n")


@pytest.mark.parametrize("code", [0, 4])
def test_a_reader_that_went_away_hides_no_failure(monkeypatch, code):
    def run(args):
        print("a line nobody reads")
        return code

    reader, writer = os.pipe()
    os.close(reader)
    install_command(monkeypatch, run)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    assert cli.main(["probe"]) == code


def test_our_own_bug_keeps_its_traceback(monkeypatch):
    def run(args):
        raise ZeroDivisionError("ours")

    install_command(monkeypatch, run)
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


def test_unknown_command(capsys):
    assert cli.main(["trian"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error[2] unknown command; where=argv; got=trian; want=one of init, ")
    assert err.endswith("; do=did you mean neox train?\n")
    assert cli.main(["xyz"]) == 2
    assert capsys.readouterr().err.endswith("; do=neox --help\n")


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)


def test_no_arguments_is_a_usage_error(capsys):
    assert cli.main([]) == 2
    assert "usage" in capsys.readouterr().out


def test_a_missing_package_is_an_environment_error(monkeypatch, capsys):
    def run(args):
        raise ModuleNotFoundError("No module named 'absent'", name="absent")

    install_command(monkeypatch, run)
    assert cli.main(["probe"]) == 14
    assert "got=absent" in capsys.readouterr().err


def test_an_unknown_option_is_a_complaint_of_the_action(capsys):
    assert cli.main(["tokenizer", "train", "--input", ".", "--vocab-size", "300", "--out", "t.json", "--nope"]) == 2
    assert (
        capsys.readouterr().err
        == "error[2] unrecognized arguments: --nope; where=neox tokenizer train; do=neox tokenizer train --help\n"
    )
    assert cli.main(["doctor", "--nope"]) == 2
    assert "where=neox doctor; do=neox doctor --help" in capsys.readouterr().err
    assert cli.main(["train", "--config", "my.yml"]) == 2
    assert "where=neox train; do=did you mean --conf? See neox train --help" in capsys.readouterr().err


@pytest.mark.parametrize("torch", [False, True])
@pytest.mark.parametrize("code", [0, 3])
def test_the_process_ends_with_the_code_and_all_that_was_printed(torch, code):
    """Without torch nothing is tidied up, but what was written is there."""
    program = f"""
import atexit, logging, sys, types
from neox.cli import main as cli
if {torch}: sys.modules["torch"] = types.ModuleType("torch")
atexit.register(print, "tidied up")
module = types.ModuleType("neox_probe_command", "A command.")
module.add_arguments = lambda parser: None
def run(args):
    sys.stdout.write("x" * 100_000)
    sys.stderr.write("e")
    return {code}
module.run = run
sys.modules["neox_probe_command"] = module
cli.COMMANDS["probe"] = ("neox_probe_command", "a command")
sys.argv = ["neox", "probe"]
cli.command()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "x" * 100_000 + ("tidied up\n" if torch else ""), "e")


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["preprocess", "--help"]])
def test_a_reader_that_went_away_leaves_no_noise(argv):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "neox.cli.main", *argv], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert done.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--conf", b"caf\xe9.yml"],
        ["config", "show", b"caf\xe9.yml"],
        ["data", "inspect", b"caf\xe9"],
        ["tokenizer", "train", "--input", b"caf\xe9.txt", "--vocab-size", "300", "--out", b"caf\xe9.json"],
        ["generate", "--checkpoint", b"caf\xe9", "--prompt", "x"],
        ["evaluate", "--checkpoint", b"caf\xe9", "--data", b"caf\xe9"],
        ["export", "--checkpoint", b"caf\xe9", "--out", b"caf\xe9-out"],
        ["import", "--from", b"caf\xe9", "--out", b"caf\xe9-out"],
        ["checkpoint", "inspect", b"caf\xe9"],
        ["report", b"caf\xe9"],
    ],
)
def test_a_name_that_is_not_utf8_is_no_traceback(tmp_path, monkeypatch, capfd, arguments):
    monkeypatch.chdir(tmp_path)
    assert cli.main([word if isinstance(word, str) else os.fsdecode(word) for word in arguments]) in (2, 3, 4)
    printed = capfd.readouterr()
    assert printed.err.startswith("error[") and "Traceback" not in printed.err


LONG = "a" * 300  # longer than any file system allows


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--conf", LONG],
        ["config", "show", LONG],
        ["init", LONG],
        ["data", "inspect", LONG],
        ["tokenizer", "train", "--input", LONG, "--vocab-size", "300", "--out", LONG],
        ["generate", "--checkpoint", LONG, "--prompt", "x"],
        ["evaluate", "--checkpoint", LONG, "--data", LONG],
        ["export", "--checkpoint", LONG, "--out", LONG],
        ["import", "--from", LONG, "--out", LONG],
        ["checkpoint", "inspect", LONG],
        ["report", LONG],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_name_that_is_too_long_is_no_traceback(tmp_path, monkeypatch, capfd, arguments):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) in (2, 3, 4, 5)
    printed = capfd.readouterr()
    assert printed.err.startswith("error[") and "Traceback" not in printed.err


PROBE = """
import os, sys, types
from neox.cli import main as cli
module = types.ModuleType("neox_probe_command", "A command.")
module.add_arguments = lambda parser: None
module.run = lambda args: {body}
sys.modules["neox_probe_command"] = module
cli.COMMANDS["probe"] = ("neox_probe_command", "a command")
sys.argv = ["neox", *{argv}]
cli.command()
"""


@pytest.mark.parametrize("argv", [["probe"], ["--help"]])
def test_a_full_disk_under_standard_output_is_an_error(argv):
    with open("/dev/full", "wb") as full:
        program = PROBE.format(body='print("x" * 100_000) or 0', argv=argv)
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 5
    assert done.stderr.startswith("error[5] cannot write; where=") and done.stderr.count("\n") == 1
    assert "got=No space left on device" in done.stderr


def test_a_failure_keeps_its_code_where_nothing_can_be_printed():
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "wb") as full:
        program = PROBE.format(body='print("x") or 4', argv=["probe"])
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=full, env=buffered)
        assert done.returncode == 4
        done = subprocess.run([sys.executable, "-m", "neox.cli.main", "nosuch"], stdout=full, stderr=full)
        assert done.returncode == 2


def test_closed_standard_streams_are_replaced_and_their_numbers_stay_taken(tmp_path):
    """A file of the run with number 1 would get what libraries print."""
    out = tmp_path / "out"
    body = (
        f'print("x") or os.write(os.open({str(out)!r}, os.O_WRONLY | os.O_CREAT), os.fsencode(sys.stdin.read())) or 7'
    )
    program = PROBE.format(body=f"{body} if os.open('/dev/null', os.O_RDONLY) > 2 else 9", argv=["probe"])
    done = subprocess.run(["bash", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, program])
    assert done.returncode == 7 and out.read_bytes() == b""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            PermissionError(13, "Permission denied", "a/b"),
            "error[5] cannot use file or folder; where=a/b; got=Permission",
        ),
        (OSError(36, "File name too long", "a"), "error[5] cannot use file or folder; where=a; got=File name too long"),
        (OSError(28, "No space left on device"), "error[5] cannot write; where=neox data; got=No space left"),
        (OSError(24, "Too many open files", "a"), "error[14] the system refused a file or process; where=a; got=Too"),
        (MemoryError(), "error[6] not enough memory; where=neox data; do="),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "error[6] not enough memory; where=neox data; got=",
        ),
    ],
)
def test_what_the_system_refuses_is_one_line(monkeypatch, capsys, error, line):
    def run(args):
        raise error

    install_command(monkeypatch, run)
    monkeypatch.setattr(cli, "leave_stdout", lambda: None)
    assert cli.main(["probe"]) == int(line[6:].partition("]")[0])
    assert capsys.readouterr().err.startswith(line.replace("neox data", "neox probe"))


def test_a_surrogate_that_gets_as_far_as_an_encoder_is_one_line():
    with pytest.raises(UnicodeEncodeError) as caught:
        "caf\udce9/x".encode()
    problem = cli.as_problem(caught.value, "data")
    assert problem.line() == (
        r"error[2] a name or text has bytes that are not UTF-8; where=neox data; got=caf\xe9/x; want=text that UTF-8 "
        r"can encode; do=rename the file or folder"
    )


def test_an_import_error_without_a_name_is_a_bug():
    assert cli.as_problem(ImportError("x"), "data") is None
    assert cli.as_problem(ImportError("x", name="torch"), "data").what == "package cannot be imported"


def test_an_interrupt_is_130_and_one_word(monkeypatch, capsys):
    def run(args):
        raise KeyboardInterrupt

    install_command(monkeypatch, run)
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--version"], 0, f"neox {cli.__version__}\n"),
        (["--debug", "--version"], 0, f"neox {cli.__version__}\n"),
        (["-h"], 0, "usage: neox"),
        (["--help"], 0, "usage: neox"),
        (["--debug"], 2, "usage: neox"),
    ],
)
def test_words_before_a_command(argv, code, said, monkeypatch, capsys):
    assert cli.main(argv) == code and capsys.readouterr().out.startswith(said)
    monkeypatch.setattr(sys, "argv", ["neox", *argv])
    assert cli.main() == code and capsys.readouterr().out.startswith(said)


def test_every_command_is_listed_with_its_summary_and_can_be_parsed(capsys):
    lines = cli.usage().splitlines()
    for name, (module, summary) in cli.COMMANDS.items():
        assert f"  {name:<15}{summary}" in lines
        found, parser, rest = cli.parse([name, "x"])
        assert (found, parser.prog, rest) == (name, f"neox {name}", ["x"])
        assert parser.get_default("neox_run") is sys.modules[module].run
        assert parser.description == (sys.modules[module].__doc__ or summary)


@pytest.mark.parametrize(
    ("word", "close"),
    [("--max-new-token", "--max-new-tokens"), ("--promt", "--prompt"), ("--xyz", None), ("-x", None)],
)
def test_the_option_that_was_meant(word, close):
    text = "[--prompt P] --max-new-tokens N see x--prompts"
    assert cli.nearest_word(word, cli.option_names(text)) == close


def test_a_wrong_value_names_the_command_and_its_help(monkeypatch, capsys):
    install_command(monkeypatch, lambda args: 0)
    assert cli.main(["probe", "--number", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error[2] argument --number: invalid int value: 'x'; where=neox probe; do=neox probe --help"
    )
    assert cli.main(["probe", "--numbr=3", "more"]) == 2
    assert (
        "unrecognized arguments: --numbr=3 more; where=neox probe; do=did you mean --number? See neox probe --help"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (ImportError("x", name="neox.data"), None),
        (ModuleNotFoundError("x", name="neox"), None),
        (ModuleNotFoundError("x", name="absent"), "package is missing"),
        (ImportError("x" * 400, name="broken"), "package cannot be imported"),
        (ValueError("x"), None),
        (UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range(128)"), None),
        (DataError("ours"), "ours"),
    ],
)
def test_what_is_a_problem_of_the_user_and_what_a_bug(error, what):
    found = cli.as_problem(error, "data")
    assert (None if found is None else found.what) == what
    if what == "package is missing":
        assert found.parts() | {"what": what} == found.parts() and (found.got, found.where) == ("absent", "neox data")
    if what == "package cannot be imported":
        assert (found.where, len(found.got)) == ("neox data: broken", 300)


def test_a_text_that_cannot_be_encoded_is_shown_around_its_error():
    with pytest.raises(UnicodeEncodeError) as caught:
        ("a" * 50 + "\udce9" + "b" * 50).encode()
    assert cli.as_problem(caught.value, "x").got == "a" * 40 + r"\xe9" + "b" * 40


@pytest.mark.parametrize(("filename", "left"), [(None, 1), ("a", 0)])
def test_the_output_is_left_where_its_own_disk_is_full(monkeypatch, capsys, filename, left):
    calls = []
    monkeypatch.setattr(cli, "leave_stdout", lambda: calls.append(1))

    def run(args):
        raise OSError(28, "No space left on device", filename)

    install_command(monkeypatch, run)
    assert cli.main(["probe"]) == 5 and len(calls) == left
    where = filename or "neox probe"
    assert f"where={where};" in capsys.readouterr().err


def test_a_terminal_that_cannot_show_a_letter_gets_its_number(monkeypatch):
    raw = io.BytesIO()
    install_command(monkeypatch, lambda args: print("caf\xe9 \u6771 \udcff") or 0)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert cli.main(["probe"]) == 0
    assert raw.getvalue() == rb"caf\xe9 \u6771 \udcff" + b"\n"  # written, not only buffered
