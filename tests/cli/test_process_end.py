"""How a command ends: exit codes, streams, signals, one line per error, and no secrets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from command import PROGRAM, STORE, Cli, absolute, shell

from hf_async_store import (
    AuthenticationError,
    DataFileConflictError,
    OperationTimeoutError,
    StorageError,
)
from hf_async_store.cli import exit_codes, main
from hf_async_store.cli.context import Context
from hf_async_store.locks import FileLock

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = pytest.mark.hf_sampled

SCRIPT = str(Path(sys.executable).with_name("hf-async-store"))
MANY = b"".join(b'{"machine_id": "m-%05d"}\n' % each for each in range(5000))


# -- exit codes and streams -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["get", "machines", "m-1"], 0),
        (["get", "machines", "nope"], 1),
        (["query", "machines", "--store", "json:nope.json"], 1),
        (["get"], 2),
        (["frobnicate"], 2),
        (["query", "machines", "status:nope=x"], 2),
        (["get", "nope", "x"], 2),
        (["put", "machines", "{}"], 2),
        (["update", "machines", "m-1", "status=X", "--expected-version", "9"], 3),
        (["put", "machines", '{"machine_id": "m-1"}', "--create"], 3),
        (["delete", "requests", "r-1"], 3),
        (["init", "--store", "json:data/db.json/x.json"], 4),
    ],
)
@pytest.mark.usefixtures("filled")
def test_exit_codes(words: list[str], code: int) -> None:
    ran = shell(*words)
    assert ran.code == code
    assert bool(ran.out) is (code == 0)
    assert len(ran.err.splitlines()) == (0 if code == 0 else 1)
    assert "Traceback" not in ran.err


@pytest.mark.usefixtures("filled")
@pytest.mark.skipif(not Path(SCRIPT).exists(), reason="the package is not installed here")
def test_the_installed_script() -> None:
    ran = shell("count", "machines", program=[SCRIPT])
    assert (ran.code, ran.out, ran.err) == (0, "3\n", "")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    from hf_async_store import __version__
    from hf_async_store.cli.arguments import COMMANDS

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf-async-store {__version__}\n"
    for words in (["--help"], *([each, "--help"] for each in COMMANDS if each != "demo")):
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("usage: hf-async-store")
        assert max(map(len, shown.splitlines())) <= 100


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err.startswith(
        "hf-async-store: no command is given; the commands are init, put, get, "
    )
    assert main(["gte"]) == 2
    assert "did you mean 'get'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["get", "machines"],
            "the following arguments are required: ID (see hf-async-store get --help)",
        ),
        (["query", "machines", "--limit", "-1"], "argument --limit: expected an integer >= 0"),
        (["query", "machines", "--limit"], "argument --limit: expected one argument"),
        (["query", "machines", "--lim", "5"], "unrecognized arguments: --lim"),
        (["get", "machines", "x", "--timeout", "0"], "expected a number of seconds > 0, got '0'"),
        (
            ["get", "machines", "x", "--timeout", "nan"],
            "expected a number of seconds > 0, got 'nan'",
        ),
        (
            ["checkpoint", "--recover-from", "disk"],
            "argument --recover-from: invalid choice: 'disk'",
        ),
        (
            ["checkpoint", "--recover-from", "file", "--recover-from", "journal"],
            "argument --recover-from: it may be given only once",
        ),
    ],
)
def test_invalid_arguments(capsys: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    assert main(words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert told in line


# -- the streams end ------------------------------------------------------------------------


def test_a_closed_output_pipe(filled: Cli) -> None:
    filled("put", "machines", stdin=MANY)
    with subprocess.Popen(
        [*PROGRAM, "query", "machines"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 141


@pytest.mark.usefixtures("filled")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_cannot_be_written() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*PROGRAM, "get", "machines", "m-1"],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert done.returncode == 4
    assert done.stderr == (b"hf-async-store: cannot write the output: No space left on device\n")


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_streams_that_are_closed(closed: str) -> None:
    command = " ".join([*PROGRAM, "get", "machines", "m-1", "nope", closed])
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60, check=False)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("words", ["put machines -", "import machines - --format jsonl", "shell"])
def test_a_command_that_reads_a_closed_stdin(words: str) -> None:
    command = f"{' '.join(PROGRAM)} {words} <&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, b"hf-async-store: stdin is closed\n")


def test_text_is_utf8_whatever_the_locale(filled: Cli) -> None:
    filled("put", "machines", '{"machine_id": "m-ä", "name": "Zoë ✓"}')
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    ran = shell("get", "machines", "m-ä", "m-ü", environment=ascii_only)
    assert ran.code == 1
    assert ran.rows[0]["name"] == "Zoë ✓"
    assert ran.message.startswith("machines has no entity 'm-")


def test_arguments_that_are_not_utf8() -> None:
    ran = subprocess.run(
        [*PROGRAM, "put", "machines", b'{"machine_id": "m-\xff"}'],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 2
    assert b"not UTF-8" in ran.stderr


# -- signals and time -----------------------------------------------------------------------


@contextmanager
def locked_store() -> Iterator[FileLock]:
    """A store whose write lock is held by another process."""
    lock = FileLock(Path("data/.db.json.lock"))
    assert lock.try_lock(exclusive=True)
    try:
        yield lock
    finally:
        lock.close()


def wait_for_the_line() -> None:
    """Wait until a process waits for the lock of the store."""
    turn = FileLock(Path("data/.db.json.lock.turn"))
    ends = time.monotonic() + 30
    while turn.try_lock(exclusive=True):
        turn.unlock()
        assert time.monotonic() < ends
        time.sleep(0.01)
    turn.close()


def test_interrupted_while_it_waits_for_the_lock(filled: Cli) -> None:
    words = ["put", "machines", '{"machine_id": "m-9"}']
    with (
        locked_store(),
        subprocess.Popen([*PROGRAM, *words], stderr=subprocess.PIPE) as process,
    ):
        wait_for_the_line()
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - began < 20  # the lock timeout is 30 s
    assert process.returncode == 130
    assert err == b"hf-async-store: interrupted\n"
    assert filled("get", "machines", "m-9").code == 1


def _interrupted(words: Sequence[str]) -> list[str]:
    """The messages of a command that Ctrl-C ends while it waits for the lock of the store."""
    with (
        locked_store(),
        subprocess.Popen([*PROGRAM, *words], stderr=subprocess.PIPE) as process,
    ):
        wait_for_the_line()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    return err.decode().splitlines()


def test_an_interrupted_restore_says_that_it_is_incomplete(filled: Cli) -> None:
    assert filled("backup", "b.jsonl.gz").code == 0
    assert filled("delete", "machines", "m-1").code == 0
    words = ["restore", "b.jsonl.gz", "--merge", "replace"]
    incomplete, interrupted = _interrupted(words)
    # Unchanged entities need no lock; the changed machine does.
    assert "the restore of b.jsonl.gz is incomplete: 3 entities are restored, " in incomplete
    assert incomplete.endswith("; run it again with --merge replace")
    assert interrupted == "hf-async-store: interrupted"
    assert filled(*words).code == 0
    assert filled("get", "machines", "m-1").code == 0


@pytest.mark.parametrize(
    ("words", "how"),
    [
        (
            ["migrate", "--from", "json:moved", "--to", STORE, "--merge", "replace"],
            "--resume continues",
        ),
        (["schema", "apply", "--collections", "wider:JOBS"], "run `schema apply` again"),
    ],
    ids=["migrate", "schema"],
)
def test_what_was_interrupted_says_how_it_goes_on(filled: Cli, words: list[str], how: str) -> None:
    assert filled("migrate", "--from", STORE, "--to", "json:moved").code == 0
    assert filled("update", "machines", "m-1", "status=MOVED", "--store", "json:moved").code == 0
    declared = "JOBS = Collection('jobs', key='id', fields=['to'], indexes=['to'])"
    Path("wider.py").write_text(f"from hf_async_store import Collection\n{declared}\n")
    goes_on, interrupted = _interrupted(words)
    assert how in goes_on
    assert interrupted == "hf-async-store: interrupted"


@pytest.mark.usefixtures("filled")
def test_interrupted_while_it_reads() -> None:
    with subprocess.Popen(
        [*PROGRAM, "put", "machines", "-"], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        # More than the buffer of a pipe: once it is written, the command is reading.
        process.stdin.write(MANY * 2)
        process.stdin.flush()
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        # Standard input stays open after it.
        assert process.wait(60) == 130
        assert process.stderr is not None
        assert process.stderr.read() == b"hf-async-store: interrupted\n"


@pytest.mark.parametrize(
    ("words", "unknown"),
    [
        (["put", "machines", '{"machine_id": "m-9"}'], False),
        (["update", "machines", "m-1", "status=X"], False),
        (["delete", "machines", "m-1"], False),
        (["delete-where", "machines", "machine_id=m-1"], True),
        (["restore", "data/db.json"], True),
        (["checkpoint"], False),
        (["backup", "--copy", "b.json"], False),
    ],
)
def test_a_timeout(filled: Cli, words: list[str], unknown: bool) -> None:
    with locked_store():
        began = time.monotonic()
        # Long enough that the command waits for the lock by then, also on a busy machine.
        ran = filled(*words, "--timeout", "2")
        assert time.monotonic() - began < 20  # the lock timeout is 30 s
    assert ran.code == 4
    assert ": not completed within 2 s; " in ran.message
    assert ("read before you write again" in ran.message) is unknown
    assert ran.message.endswith("allow more time with --timeout")
    assert filled("get", "machines", "m-1", "--timeout", "30").code == 0
    assert filled("get", "machines", "m-9").code == 1


def test_a_timeout_between_batches(filled: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter([30.0])

    def remaining_time(context: Context) -> float:
        try:
            return next(calls)
        except StopIteration:
            raise OperationTimeoutError("late") from None

    monkeypatch.setattr(Context, "remaining_time", remaining_time)
    ran = filled("put", "machines", "--timeout", "30", stdin=MANY)
    assert ran.code == 4
    assert ran.err.splitlines() == [
        "hf-async-store: 1,000 of 5,000 entities were stored before the command ended",
        "hf-async-store: put machines: not completed within 30 s; nothing further was written; "
        "allow more time with --timeout",
    ]


@pytest.mark.usefixtures("filled")
def test_a_lock_held_by_another_process() -> None:
    with locked_store():
        ran = shell(
            "put",
            "machines",
            '{"machine_id": "m-9"}',
            "--store",
            "json:data/db.json?lock_timeout=0.2",
        )
    assert ran.code == 4
    lock = absolute("data/.db.json.lock")
    assert f"the lock {lock} was not free for writing within 0.2 s" in ran.message


# -- what is wrong beneath ------------------------------------------------------------------


def test_a_damaged_file(filled: Cli) -> None:
    Path("data/db.json").write_text('{"machines": {"m-1": {"status": }}}')
    for words in (["get", "machines", "m-1"], ["count", "machines"], ["checkpoint"]):
        ran = filled(*words)
        assert (ran.code, ran.out) == (4, "")
        assert "data/db.json" in ran.message
        assert "`hf-async-store restore`" in ran.message


def test_a_damaged_journal(filled: Cli) -> None:
    [journal] = Path("data").glob("*.journal.*")
    journal.write_bytes(b"x" * 50 + journal.read_bytes())
    ran = filled("get", "machines", "m-1")
    assert ran.code == 4
    assert f"{journal} at byte 0: " in ran.message
    assert "`hf-async-store restore`" in ran.message


def test_a_file_with_the_name_of_the_folder(cli: Cli) -> None:
    Path("data").write_text("")
    for words in (["put", "machines", '{"machine_id": "m-1"}'], ["init"]):
        ran = cli(*words)
        assert ran.code == 4
        assert absolute("data") in ran.message
        assert ran.message.endswith(
            "there is a file where a folder is needed, or the reverse: correct the path, or move the "
            "file"
        )
    # It cannot be determined whether the store exists: this is not "not found".
    ran = cli("get", "machines", "m-1")
    assert ran.code == 4
    assert absolute("data") in ran.message


def test_a_folder_that_cannot_be_written(filled: Cli) -> None:
    for each in Path("data").iterdir():
        each.chmod(0o400)
    Path("data").chmod(0o500)
    if os.access("data", os.W_OK):
        pytest.skip("who runs this may write everywhere")
    try:
        assert filled("get", "machines", "m-1").code == 0
        ran = filled("put", "machines", '{"machine_id": "m-9"}')
        assert ran.code == 4
        assert "check the owner and mode of the files and of their folder" in ran.message
    finally:
        Path("data").chmod(0o700)


def test_an_invalid_path(cli: Cli) -> None:
    ran = cli("count", "machines", "--store", f"json:{'x' * 300}.json")
    assert ran.code == 4
    assert "File name too long" in ran.message


def test_a_message_is_one_printable_line(filled: Cli) -> None:
    ran = filled("get", "machines\x1b[31m\nx", "m-1")
    assert ran.code == 2
    assert ran.message.isprintable()


# -- defects, traces and secrets ------------------------------------------------------------


def test_an_unexpected_exception(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("what nobody foresaw")

    monkeypatch.setattr("hf_async_store.cli.context.open_store", broken)
    ran = cli("count", "machines")
    assert ran.code == 4
    assert ran.message == (
        "this is a bug in hf-async-store, please report it: KeyError: 'what nobody foresaw' "
        "(--verbose shows the traceback)"
    )
    assert "in broken" in cli("count", "machines", "--verbose").err


@pytest.mark.usefixtures("filled")
def test_verbose_shows_the_traceback() -> None:
    ran = shell("--verbose", "get", "nope", "x")
    assert ran.code == 2
    first, *rest = ran.err.splitlines()
    assert first.startswith("hf-async-store: no collection 'nope'")
    assert rest[0] == "Traceback (most recent call last):"


@pytest.mark.parametrize("verbose", [[], ["--verbose"]])
@pytest.mark.parametrize(
    "words",
    [
        ["count", "machines", "--store", "postgresql://app:hunter2@h/x?pool_size=x"],
        ["count", "machines", "--store", "postgresql://app:hunter2@h:port/x"],
        ["count", "machines", "--stor", "postgresql://app:hunter2@h/x"],
        ["count", "machines", "--store", "postgres://app:hunter2@h/x"],
        ["count", "machines", "--config", "postgresql://app:hunter2@h/x"],
        ["postgresql://app:hunter2@h/x"],
        ["restore", "postgresql://app:hunter2@h/x"],
        ["backup", "--copy", "postgresql://app:hunter2@h/x"],
        ["put", "machines", "--file", "postgresql://app:hunter2@h/x"],
    ],
)
def test_secrets_are_not_shown(filled: Cli, words: list[str], verbose: list[str]) -> None:
    ran = filled(*words, *verbose)
    assert ran.code == 2
    assert "hunter2" not in ran.out + ran.err


def test_an_error_that_says_what_to_do_gets_no_further_hint() -> None:
    error = AuthenticationError("cannot connect: no; correct username or password")
    assert exit_codes.sentence(error) == str(error)
    removed = DataFileConflictError("jobs.db was removed while the store was in use: restore it")
    assert exit_codes.sentence(removed) == str(removed)  # SQLite: no word about JSON backups


def test_every_error_has_a_code() -> None:
    def kinds(kind: type[StorageError]) -> Iterator[type[StorageError]]:
        yield kind
        for each in kind.__subclasses__():
            yield from kinds(each)

    codes = {each.__name__: exit_codes.code_of_kind(each) for each in kinds(StorageError)}
    assert codes["EntityNotFoundError"] == 1
    assert {codes[each] for each in codes if each.startswith("Invalid")} == {2}
    assert {
        codes[each]
        for each in (
            "ConcurrencyConflictError",
            "RetriesExhaustedError",
            "AlreadyExistsError",
            "ReferenceViolationError",
        )
    } == {3}
    assert codes["AuthenticationError"] == codes["ConfigurationError"] == 2
    assert codes["CorruptionError"] == codes["LockTimeoutError"] == codes["DiskFullError"] == 4
