"""backup, restore, backups: which data are kept and restored, also into a damaged store."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import Cli, absolute, shell

SPLIT = ("--store", "json:split")


def content(path: str | Path) -> Any:
    data = Path(path).read_bytes()
    return json.loads(gzip.decompress(data) if str(path).endswith(".gz") else data)


def state(cli: Cli, *words: str) -> dict[str, dict[str, Any]]:
    """The entities by collection and id, without the fields that the store sets."""
    own = ("version", "updated_at")
    return {
        name: {
            row[f"{name[:-1]}_id"]: {key: value for key, value in row.items() if key not in own}
            for row in cli("query", name, *words).rows
        }
        for name in ("templates", "requests", "machines")
    }


# -- backup ---------------------------------------------------------------------------------


def test_backup_to_a_new_file(filled: Cli) -> None:
    ran = filled("backup", "--copy", "kept/before.json")
    assert ran.code == 0
    files = ["kept/before.json", "kept/.before.json.declarations"]
    size = sum(Path(each).stat().st_size for each in files)
    assert ran.rows == [{"backup": "kept/before.json", "files": files, "bytes": size}]
    assert Path("kept/before.json").stat().st_mode & 0o777 == 0o600
    assert len(content("kept/before.json")["machines"]) == 3
    assert sorted(map(str, Path("kept").iterdir())) == sorted(files)


def test_backup_contains_the_commits_of_the_journal(filled: Cli) -> None:
    # A store that another process has open is not compacted at close.
    code = (
        "import asyncio\nfrom hf_async_store import open_store\n"
        "async def main():\n"
        "    store = await open_store('json:data/db.json').open()\n"
        "    await store.update_entity('machines', 'm-1', {'status': 'NEW'})\n"
        "    print('ready', flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            other.stdout.readline()
            assert filled("backup", "--copy", "b.json").code == 0
        finally:
            other.kill()
    assert content("b.json")["machines"]["m-1"]["status"] == "NEW"


def test_backup_into_a_folder_has_a_dated_name(filled: Cli) -> None:
    Path("there").mkdir()
    names = [
        filled("backup", "--copy", each).rows[0]["backup"] for each in ("there", "there", "new/")
    ]
    names.append(filled("backup", "--copy").rows[0]["backup"])
    assert len(set(names)) == 4
    assert [Path(each).parent.name for each in names] == ["there", "there", "new", "backups"]
    assert all(Path(each).name.startswith("backup_2") for each in names)
    assert all(len(content(each)["machines"]) == 3 for each in names)


def test_backup_goes_where_the_configuration_says(filled: Cli) -> None:
    block = {"base_path": "data", "filenames": {"single_file": "db.json"}}
    storage = {"strategy": "json", "json_strategy": block}
    whole = {"storage": storage, "migration": {"backup_location": "elsewhere/"}}
    Path("config.json").write_text(json.dumps(whole))
    ran = filled("backup", "--copy", "--config", "config.json")
    assert Path(ran.rows[0]["backup"]).parent.name == "elsewhere"


def test_backup_never_overwrites(filled: Cli) -> None:
    filled("backup", "--copy", "b.json")
    ran = filled("backup", "--copy", "b.json")
    assert ran.code == 2
    assert ran.message == "b.json exists already; a backup needs a new name"


def test_backup_of_split_files(cli: Cli) -> None:
    cli("put", "templates", '{"template_id": "t-1"}', *SPLIT)
    cli("put", "machines", '{"machine_id": "m-1"}', *SPLIT)
    ran = cli("backup", "--copy", "b", *SPLIT)
    assert ran.code == 0
    names = [".store.declarations", "machines.json", "templates.json"]
    assert sorted(each.name for each in Path("b").iterdir()) == names
    assert list(content("b/machines.json")) == ["m-1"]
    assert cli("backup", "--copy", "b", *SPLIT).rows[0]["backup"].startswith("b/backup_")


def test_backup_of_compressed_files_is_named_so(cli: Cli) -> None:
    url = "json:z/db.json?enable_compression=yes"
    cli("put", "templates", '{"template_id": "t-1"}', "--store", url)
    assert cli("backup", "--copy", "b.json", "--store", url).rows[0]["backup"] == "b.json.gz"
    assert list(content("b.json.gz")["templates"]) == ["t-1"]
    cli("delete", "templates", "t-1", "--store", url)
    assert cli("restore", "b.json.gz", "--store", url).code == 0
    assert cli("count", "templates", "--store", url).out == "1\n"


def test_an_invalid_destination(filled: Cli) -> None:
    ran = filled("backup", "--copy", "data/db.json/b.json")
    assert ran.code == 4
    assert "cannot write data/db.json/b.json: " in ran.message
    assert ran.message.endswith(
        "there is a file where a folder is needed, or the reverse: correct the path, or move the file"
    )


def test_backups_under_load_are_consistent(workplace: Path) -> None:
    """Backups are consistent during transactions over two files and continuous compactions."""
    code = (
        "import asyncio, itertools\nfrom hf_async_store import open_store\n"
        "async def main():\n"
        "    async with open_store('json:split?write_buffer_size=500&sync_writes=no') as store:\n"
        "        for n in itertools.count():\n"
        "            async with store.begin_transaction() as tx:\n"
        "                await tx.save_entity('templates', {'template_id': 't', 'n': n})\n"
        "                await tx.save_entity('machines', {'machine_id': 'm', 'n': n})\n"
        "            if not n:\n"
        "                print('ready', flush=True)\n"
        "asyncio.run(main())\n"
    )
    seen = [-1]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout is not None
            writer.stdout.readline()
            for number in range(3):
                ran = shell("backup", "--copy", f"b{number}", *SPLIT)
                assert ran.code == 0, ran.err
                numbers = {
                    content(f"b{number}/templates.json")["t"]["n"],
                    content(f"b{number}/machines.json")["m"]["n"],
                }
                assert len(numbers) == 1
                seen += numbers
        finally:
            writer.kill()
    assert seen == sorted(seen)


# -- restore --------------------------------------------------------------------------------


def test_restore(filled: Cli) -> None:
    before = state(filled)
    filled("backup", "--copy", "b.json")
    filled("update", "machines", "m-1", "status=GONE")
    filled("delete", "machines", "m-2")
    filled("put", "templates", '{"template_id": "t-2"}')
    ran = filled("restore", "b.json")
    [done] = ran.rows
    assert (ran.code, ran.err) == (0, "")
    assert done["restored"] == "b.json"
    assert done["entities"] == {"templates": 1, "requests": 2, "machines": 3}
    assert state(filled) == before
    versions = {row["machine_id"]: row["version"] for row in filled("query", "machines").rows}
    assert versions == {"m-1": 3, "m-2": 1, "m-3": 1}
    # The previous contents can be restored, too.
    assert done["before"].startswith(absolute("data/replaced_2"))
    assert filled("restore", done["before"]).code == 0
    assert filled("get", "machines", "m-1").rows[0]["status"] == "GONE"
    assert filled("get", "templates", "t-2").code == 0


def test_restore_split_files_and_back(cli: Cli) -> None:
    cli("put", "machines", '{"machine_id": "m-1", "n": 1}', *SPLIT)
    cli("put", "templates", '{"template_id": "t-1"}', *SPLIT)
    cli("backup", "--copy", "b", *SPLIT)
    cli("update", "machines", "m-1", "n=2", *SPLIT)
    [done] = cli("restore", "b", *SPLIT).rows
    assert cli("get", "machines", "m-1", *SPLIT).rows[0]["n"] == 1
    assert sorted(each.name for each in Path(done["before"]).iterdir()) == [
        "machines.json",
        "requests.json",
        "templates.json",
    ]
    assert cli("restore", done["before"], *SPLIT).code == 0
    assert cli("get", "machines", "m-1", *SPLIT).rows[0]["n"] == 2


def test_restore_of_the_current_contents(filled: Cli) -> None:
    filled("backup", "--copy", "b.json")
    assert filled("restore", "b.json").rows[0]["before"] is None
    assert filled("get", "machines", "m-1").rows[0]["version"] == 1


def test_restore_into_an_empty_folder(filled: Cli) -> None:
    before = state(filled)
    filled("backup", "--copy", "b.json")
    for each in Path("data").iterdir():
        each.unlink()
    Path("data").rmdir()
    assert filled("restore", "b.json").code == 0
    assert state(filled) == before


def test_restore_into_another_layout(filled: Cli) -> None:
    before = state(filled)
    filled("backup", "--copy", "b.json")
    assert filled("restore", "b.json", *SPLIT).code == 0
    assert state(filled, *SPLIT) == before
    filled("backup", "--copy", "b", *SPLIT)
    filled("delete", "machines", "m-1", "m-2")
    assert filled("restore", "b").code == 0
    assert state(filled) == before


def test_restore_one_file_of_several(filled: Cli) -> None:
    filled("backup", "--copy", "b.json")
    filled("restore", "b.json", *SPLIT)
    filled("delete", "machines", "m-1", *SPLIT)
    filled("checkpoint", *SPLIT)
    filled("update", "requests", "r-1", "status=LATER", *SPLIT)
    backups = [each["backup"] for each in filled("backups", *SPLIT).rows]
    machines = next(each for each in backups if "machines" in each)
    ran = filled("restore", machines, *SPLIT)
    assert (ran.code, ran.rows[0]["entities"]) == (0, {"machines": 3})
    assert filled("count", "machines", *SPLIT).out == "3\n"
    assert filled("get", "requests", "r-1", *SPLIT).rows[0]["status"] == "LATER"


def test_a_restore_writes_nothing_beside_the_backup(filled: Cli) -> None:
    filled("backup", "--copy", "kept/b.json")
    before = sorted(Path("kept").iterdir())
    filled("restore", "kept/b.json")
    assert sorted(Path("kept").iterdir()) == before


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("role", ["source", "target"])
def test_a_migration_record_in_a_backup_is_not_followed(
    filled: Cli, role: str, damaged: bool
) -> None:
    other = f"sqlite:{Path('planted.db').absolute()}"
    record = {"move_id": "move", "role": role, "phase": "SWITCHED", "other": other}
    text = {
        "machines": {"m-9": {"machine_id": "m-9"}},
        "hf_move": {"move": {**record, "epoch": 1, "term": 1, "version": 1}},
        "hf_marks": {"x": {"mark_id": "x", "collection": "machines", "id": "m-9", "version": 1}},
        "notes": {"n": {"a": 1}},
    }
    Path("b.json").write_text(json.dumps(text))
    if damaged:
        Path("data/db.json").write_text("{")
    ran = filled("restore", "b.json", "--leave-out", "notes")
    assert ran.code == 0, ran.err
    assert [each["machine_id"] for each in filled("query", "machines").rows] == ["m-9"]
    assert not Path("planted.db").exists()
    assert b"hf_move" not in Path("data/db.json").read_bytes()
    assert b"notes" not in Path("data/db.json").read_bytes()


@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        (
            b'{"machines": {"m-1":',
            4,
            "b.json is not a valid backup: b.json is not a valid JSON object",
        ),
        (b'{"machines": {"m-1": 5}}', 4, "b.json is not a valid backup: machines 'm-1' "),
        (b'{"machines": {"m-1": {"a": "\xff"}}}', 4, "b.json is not a valid backup: "),
        (b"[]", 4, "b.json is not a valid backup: b.json is not a valid JSON object"),
        (b"", 4, "b.json is not a valid backup: "),
        (
            b'{"storage": {}}',
            2,
            "it holds 'storage', but none of the collections templates, requests, machines",
        ),
        (
            b'{"machines": {"m-1": {"status": 5}}}',
            2,
            "b.json, machines 'm-1': machines.status is declared as text, but the value is an integer",
        ),
        (
            b'{"machines": {"m-1": {"request_id": "r-9"}}}',
            3,
            "request_id refers to 'r-9', which does not exist in requests",
        ),
    ],
)
def test_an_invalid_backup_changes_nothing(filled: Cli, text: bytes, code: int, told: str) -> None:
    before = filled("query", "machines").rows
    Path("b.json").write_bytes(text)
    ran = filled("restore", "b.json")
    assert ran.code == code
    assert told in ran.message
    assert filled("query", "machines").rows == before
    assert not list(Path("data").glob("replaced_*"))


def test_a_backup_that_is_not_there(filled: Cli) -> None:
    ran = filled("restore", "nope.json")
    assert ran.code == 1
    assert ran.message == (
        "the backup nope.json does not exist; `hf-async-store backups` lists the backups that a "
        "JSON store has kept"
    )
    Path("empty").mkdir()
    ran = filled("restore", "empty")
    assert ran.code == 2
    assert "it holds none of the files templates.json, requests.json, machines.json" in ran.message


def test_undeclared_collections_are_not_left_out_silently(filled: Cli) -> None:
    Path("b.json").write_text('{"machines": {"m-1": {}}, "orders": {"o-1": {}}}')
    before = state(filled)
    ran = filled("restore", "b.json")
    assert ran.code == 2
    assert "b.json holds undeclared collections: 'orders'; nothing was changed" in ran.message
    assert "--leave-out NAME" in ran.message
    assert state(filled) == before
    ran = filled("restore", "b.json", "--leave-out", "orders")
    assert ran.code == 0
    assert ran.message == "note: left out, as requested: 'orders'"
    assert filled("count", "machines").out == "1\n"


def damaged_file(cli: Cli) -> None:
    Path("data/db.json").write_bytes(b'{"machines": {"m-1": {,}')


def damaged_entity(cli: Cli) -> None:
    path = Path("data/db.json")
    path.write_bytes(path.read_bytes().replace(b'"STOPPED"', b'"STOP\xff"'))


def damaged_journal(cli: Cli) -> None:
    [path] = Path("data").glob("*.journal.*")
    path.write_bytes(b"\x00" * 100 + path.read_bytes())


def commit_and_die(url: str, collection: str, entity_id: str) -> None:
    """Make a commit that is only in the journal."""
    code = (
        "import asyncio, os, sys\nfrom hf_async_store import open_store\n"
        "async def main(url, collection, entity_id):\n"
        "    store = await open_store(url).open()\n"
        "    key = store.collections[collection].key\n"
        "    await store.save_entity(collection, {key: entity_id})\n"
        "    os._exit(0)\n"
        "asyncio.run(main(*sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, url, collection, entity_id]
    subprocess.run(command, check=True, timeout=60)


def replaced_file(cli: Cli) -> None:
    """Replace a data file while the journal contains commits."""
    commit_and_die("json:data/db.json", "templates", "t-9")
    Path("data/db.json").write_text('{"templates": {"t-3": {"template_id": "t-3"}}}')


@pytest.mark.parametrize("damage", [damaged_file, damaged_entity, damaged_journal, replaced_file])
def test_restore_a_store_that_cannot_be_opened(filled: Cli, damage: Any) -> None:
    before = state(filled)
    filled("backup", "--copy", "b.json")
    damage(filled)
    damaged = Path("data/db.json").read_bytes()
    broken = filled("query", "machines", "--order", "status")
    assert broken.code == 4
    assert "hf-async-store" in broken.message
    ran = filled("restore", "b.json")
    assert ran.code == 0
    assert "hf-async-store: the store cannot be opened, so its files are replaced: " in ran.err
    aside = ran.rows[0]["before"]
    assert aside.startswith(absolute("data/damaged_2"))
    if damage is not damaged_entity:  # compactions keep that section, in a new layout
        assert (Path(aside) / "db.json").read_bytes() == damaged
    assert len(list(Path(aside).glob("*.journal.*"))) == 1
    assert state(filled) == before
    assert filled("health").rows[0]["ok"] is True
    assert filled("update", "machines", "m-1", "status=ON").code == 0


def test_restore_damaged_split_files(filled: Cli) -> None:
    filled("backup", "--copy", "b.json")
    filled("restore", "b.json", *SPLIT)
    filled("backup", "--copy", "b", *SPLIT)
    before = state(filled, *SPLIT)
    Path("split/machines.json").write_bytes(b"{")
    Path("split/requests.json").write_bytes(b"[")
    assert filled("restore", "b", *SPLIT).code == 0
    assert state(filled, *SPLIT) == before
    # Also into files of another layout.
    Path("split/machines.json").write_bytes(b"{")
    assert filled("restore", "b.json", *SPLIT).code == 0
    assert state(filled, *SPLIT) == before


def test_restore_one_damaged_file_keeps_the_commits_of_the_others(filled: Cli) -> None:
    filled("backup", "--copy", "b.json")
    filled("restore", "b.json", *SPLIT)
    filled("backup", "--copy", "b", *SPLIT)
    Path("split/machines.json").write_bytes(b"{")
    ran = filled("restore", "b/machines.json", *SPLIT)
    assert ran.code == 0
    assert filled("count", "machines", *SPLIT).out == "3\n"


def test_restore_one_damaged_file_when_commits_wait(filled: Cli) -> None:
    filled("backup", "--copy", "b.json")
    filled("restore", "b.json", *SPLIT)
    filled("backup", "--copy", "b", *SPLIT)
    commit_and_die("json:split", "templates", "t-9")
    Path("split/templates.json").write_bytes(b"{")
    # The file on which the journal is based: there is no conflict.
    assert filled("restore", "b/templates.json", *SPLIT).code == 0
    assert filled("count", "templates", *SPLIT).out == "2\n"
    # Another file: the command cannot decide which of the two is valid.
    commit_and_die("json:split", "templates", "t-10")
    Path("split/templates.json").write_bytes(b"{")
    Path("b/templates.json").write_text('{"t-1": {"template_id": "t-1"}}')
    ran = filled("restore", "b/templates.json", *SPLIT)
    assert ran.code == 4
    *_, last = ran.err.splitlines()
    assert "checkpoint --recover-from file" in last
    assert "--recover-from journal" in last
    assert filled("checkpoint", "--recover-from", "journal", *SPLIT).code == 0
    assert [each["template_id"] for each in filled("query", "templates", *SPLIT).rows] == [
        "t-1",
        "t-10",
    ]


@pytest.mark.parametrize("url", ["json:new/db.json", "json:new", "sqlite:new.db"])
def test_an_empty_backup_restores_an_empty_store(cli: Cli, url: str) -> None:
    assert cli("init").code == 0
    assert cli("backup", "empty.jsonl.gz").code == 0
    assert cli("restore", "empty.jsonl.gz", "--store", url).code == 0
    ran = cli("count", "machines", "--store", url)
    assert (ran.code, ran.out) == (0, "0\n")


def test_an_empty_copy_restores_an_empty_store(cli: Cli) -> None:
    cli("init")
    assert cli("backup", "--copy", "empty.json").code == 0
    assert cli("restore", "empty.json", "--store", "json:new/db.json").code == 0
    assert cli("count", "machines", "--store", "json:new/db.json").out == "0\n"
    assert cli("restore", "empty.json").rows[0]["before"] is None


@pytest.mark.parametrize("words", [["backup"], ["backup", "--copy", "b.json"]])
def test_no_backup_of_a_store_that_is_absent(cli: Cli, words: list[str]) -> None:
    ran = cli(*words, "--store", "json:absent/db.json")
    assert ran.code == 1
    assert "there is no store at absent/db.json" in ran.message
    assert list(Path().iterdir()) == []


# -- backups --------------------------------------------------------------------------------


def test_backups(filled: Cli) -> None:
    for status in "ABC":
        filled("update", "machines", "m-1", f"status={status}")
    rows = filled("backups").rows
    assert rows[0]["backup"].startswith(absolute("data/db.json.bak."))
    assert rows == sorted(rows, key=lambda each: each["backup"], reverse=True)
    assert all(each["bytes"] > 0 and each["written"].endswith("Z") for each in rows)
    assert filled("restore", rows[0]["backup"]).code == 0
    assert filled("get", "machines", "m-1").rows[0]["status"] == "B"


def test_no_backups_yet(cli: Cli) -> None:
    cli("init")
    ran = cli("backups")
    assert (ran.code, ran.out) == (0, "")
    assert ran.message == "data/db.json has not kept any backup yet"
