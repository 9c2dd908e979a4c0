"""`shell`: statements from a pipe and on a terminal, Ctrl-C, Ctrl-D, history."""

from __future__ import annotations

import os
import pty
import re
import select
import stat
import subprocess
import time
from typing import TYPE_CHECKING, Self

import pytest
from command import PROGRAM, shell

if TYPE_CHECKING:
    from pathlib import Path

    from command import Cli

PROMPT = ">>> "


def statements(*lines: str) -> tuple[int, list[str], str]:
    ran = shell("shell", stdin="\n".join(lines).encode())
    return ran.code, ran.out.splitlines(), ran.err


@pytest.mark.usefixtures("filled")
def test_statements_of_a_pipe() -> None:
    code, out, err = statements(
        "await store.count_entities('machines')",
        "async with store.begin_transaction() as tx:",
        "    await tx.update_entity('machines', 'm-1', {'name': 'new'})",
        "",
        "[each['name'] async for each in store.stream_entities('machines', {'name': 'new'})]",
        "_[0] + '\\n'",
        "and_({'status': 'RUNNING'}) is not None",
        "store.count_entities('machines')",
        "await store.get_entity('machines', 'm-1')",
    )
    assert code == 0
    assert out[:5] == ["3", "2", "['new']", "'new\\n'", "True"]
    assert "'machine_id': 'm-1'," in "".join(out[5:])
    assert err == "a coroutine: write `await` before count_entities(...)\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("await store.get_entities('nothing', ['x'])", "UnknownCollectionError: "),
        ("await asyncio.sleep('x')", "TypeError: "),
        ("raise ValueError('x')", "ValueError: x"),
        ("import asyncio; raise asyncio.CancelledError", "CancelledError"),
    ],
)
@pytest.mark.usefixtures("filled")
def test_an_error_ends_a_pipe(cli: Cli, line: str, message: str) -> None:
    code, out, err = cli("shell", stdin=f"1\n{line}\n2".encode())
    assert (code, out) == (2, "1\n")
    assert message in err
    assert err.splitlines()[-1].startswith("hf-async-store: the statement failed")


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("1 +* 2", "invalid syntax"),
        ("def f(", "'(' was never closed"),
        ('x = """open', "unterminated triple-quoted string"),
        ("for each in range(3):", "expected an indented block"),
        ("return 1", "'return' outside function"),
        ("x = '\xff'", "can't decode byte"),
        ("x = '\0'", "null bytes"),
        pytest.param("+".join("1" * 20_000), "maximum recursion depth", id="too-deep"),
        pytest.param("-" * 100_000 + "1", "MemoryError", id="too-deep-to-be-parsed"),
    ],
)
@pytest.mark.usefixtures("filled")
def test_input_that_is_not_valid_runs_nothing(cli: Cli, end: str, message: str) -> None:
    code, out, err = cli("shell", stdin=f"1\n{end}".encode("latin-1"))
    assert (code, out) == (2, "")
    assert message in err
    assert err.splitlines()[-1].endswith(": the input is not valid Python; nothing was run")


@pytest.mark.usefixtures("filled")
def test_ctrl_c_ends_a_pipe(cli: Cli) -> None:
    ran = cli("shell", stdin=b"1\nraise KeyboardInterrupt\n2")
    assert (ran.code, ran.out, ran.message) == (130, "1\n", "interrupted")


@pytest.mark.parametrize(
    ("line", "code", "err"),
    [
        ("exit()", 0, ""),
        ("raise SystemExit(7)", 7, ""),
        ("raise SystemExit('postgresql://u:pw@h/d failed')", 1, "postgresql://u:***@h/d failed\n"),
    ],
)
@pytest.mark.usefixtures("filled")
def test_a_pipe_may_end_itself(cli: Cli, line: str, code: int, err: str) -> None:
    assert cli("shell", stdin=f"1\n{line}\n2".encode()) == (code, "1\n", err)
    text = f"async def end():\n    {line}\nawait end()\n2"
    assert cli("shell", stdin=text.encode()) == (code, "", err)


@pytest.mark.usefixtures("filled")
def test_empty_lines_do_not_end_a_block(cli: Cli) -> None:
    text = """
async with store.begin_transaction() as tx:
    await tx.update_entity('machines', 'm-1', {'name': 'half'})

    await tx.update_entity('machines', 'm-2', {'name': 'half'})
    raise ValueError('rolled back')
"""
    code, _, err = cli("shell", stdin=text.encode())
    assert code == 2
    assert "ValueError: rolled back" in err
    assert cli("count", "machines", "name=half").out == "0\n"
    text = """
def double(x: Unknown):
    y = x

    return 2 * y
for each in range(2):
    await asyncio.sleep(0)
    double(each)
'after'
"""
    code, out, err = cli("shell", stdin=text.encode())
    assert (code, out) == (2, "")
    assert "NameError: name 'Unknown' is not defined" in err
    text = f"from __future__ import annotations\n{text}"
    assert cli("shell", stdin=text.encode()) == (0, "0\n2\n'after'\n", "")


@pytest.mark.usefixtures("filled")
def test_read_only(cli: Cli) -> None:
    for verb in ("save_entity('machines', {'machine_id': 'x'})", "begin_transaction()", "close()"):
        code, _, err = cli("shell", "--read-only", stdin=f"await store.{verb}".encode())
        assert code == 2
        assert err.startswith(f"InvalidInputError: {verb.partition('(')[0]} could write")
    line = b"len(await store.query_entities('machines'))"
    assert cli("shell", "--read-only", stdin=line)[:2] == (0, "3\n")
    code, _, err = cli("shell", "--read-only", stdin=b"async with store.watch('machines'): pass")
    assert "InvalidInputError: machines is declared without feed=" in err


class Terminal:
    """A shell on a terminal of its own."""

    def __init__(self, folder: Path) -> None:
        ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "XDG_STATE_HOME": str(folder)}
        self._process = subprocess.Popen(
            [*PROGRAM, "shell"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: _control(0),
        )
        os.close(theirs)
        self._ours = ours
        self.seen = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def expect(self, text: str) -> str:
        """Wait for a text; returns what was written before it."""
        assert self._comes(text, 60), self.seen
        before, _, self.seen = self.seen.partition(text)
        return before.replace("\r\n", "\n")

    def interrupt(self) -> None:
        """Press Ctrl-C, until the prompt comes again.

        Once is not always enough: Python looks for signals, and then waits for a key or a lock. A signal
        between these two steps, which a busy machine makes longer, is seen with the next one.
        """
        for _ in range(6):
            self.type("\x03")
            if self._comes("KeyboardInterrupt", 10):
                break
        self.expect("KeyboardInterrupt")
        self.expect(PROMPT)

    def _comes(self, text: str, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._ours], [], [], left)[0]:
                return False
            self.seen += os.read(self._ours, 4096).decode()
        return True

    def wait(self) -> int:
        return self._process.wait(timeout=60)


def _control(terminal: int) -> None:
    """Make it the controlling terminal, so that ^C is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


@pytest.mark.usefixtures("filled")
def test_a_terminal(workplace: Path) -> None:
    with Terminal(workplace) as terminal:
        assert "collections: templates, requests, machines" in terminal.expect(PROMPT)
        terminal.type("await store.count_entities('machines')\n")
        assert re.search(r"\)\n3\n$", terminal.expect(PROMPT))
        for endless in ("await asyncio.sleep(1000)", "[None for each in iter(int, 1)]"):
            terminal.type(f"print('be' + 'gun'); {endless}\n")
            terminal.expect("begun")
            terminal.interrupt()
        terminal.type("1 + ")  # while a line is typed
        terminal.expect("1 + ")
        terminal.interrupt()
        terminal.type("await store.count_entities('requests')\n")  # the store is still open
        assert re.search(r"\)\n2\n$", terminal.expect(PROMPT))
        terminal.type("\x04")
        assert terminal.wait() == 0
    history = workplace / "hf-async-store" / "shell_history"
    assert "await store.count_entities('requests')" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_a_store_that_does_not_exist(cli: Cli) -> None:
    code, out, err = cli("shell", "--store", "json:nope.json", stdin=b"1")
    assert (code, out) == (1, "")
    assert "there is no store at nope.json" in err


def test_exit_ends_the_shell(filled: Cli) -> None:
    assert filled("count", "machines").code == 0
    assert statements("1", "exit()", "2")[:2] == (0, ["1"])
    assert statements("await asyncio.sleep(0); exit(3)")[0] == 3
