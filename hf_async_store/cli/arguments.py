"""The commands, their arguments and their manual.

Two parsers, one after the other: the first finds the command, and only that command's own is made,
so that no start pays for the others. It also lets options and words of a command come in any order.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from hf_async_store.cli.commands import Command
from hf_async_store.cli.output import PROGRAM, line
from hf_async_store.errors import InvalidInputError

STORE_VARIABLE: Final = "HF_ASYNC_STORE"
_WIDTH: Final = 100

_MANUAL: Final = f"""\
which store: --store URL, --config FILE, or the environment variable {STORE_VARIABLE}, which holds
either. Options may stand before or after the command.

  json:data/request_database.json    one JSON file
  json:data                          a folder with a JSON file for each collection

  Passwords are best left to the environment: '...://app:${{DB_PASSWORD}}@host/name', in quotes.

On a terminal, results come as tables and indented JSON; in a pipe, or with --json, as one JSON
value a line. Messages go to stderr, one line each.

exit codes:
  0  done          1  not found: the entity, or the store itself
  2  wrong usage   3  conflict: another version, exists already, references, or stores differ
  4  the store failed, or `health` found problems      130  Ctrl-C      141  broken pipe
"""

_PURPOSE: Final = "Keep templates, requests, machines and your own collections in one store."

_EXAMPLES: Final = f"""\
examples:
  {PROGRAM} --store json:data/request_database.json init
  export {STORE_VARIABLE}=json:data/request_database.json
  {PROGRAM} put templates '{{"template_id": "t-1", "name": "Standard"}}'
  {PROGRAM} get templates t-1
  {PROGRAM} query machines status=RUNNING created_at:gt=2025-06-30 --order -created_at
  {PROGRAM} query --help
"""

_FILTER_HELP: Final = """\
  FIELD=VALUE             has this value              FIELD:OPERATOR=VALUE
  tags/owner=ops          inside a map                disks/0/size:gte=100    inside a list
  status:in=A,B           one of                      count:between=1,10      both included
  done_at:exists=false    not there (null is there)   name:=null              any JSON behind :=
  '["a/b:c"]=x'           a name with / : = in it: the steps as a JSON list

  operators: eq ne lt lte gt gte in not_in between exists contains begins_with

A value is read as the field's declared type. In a json field, or one that is not declared, it is
JSON if it reads as such, else text: zone=7 is the number, zone:='"7"' the text. All must match.
"""


class _Manual(argparse.RawDescriptionHelpFormatter):
    """Help of one width: asking for that of the terminal imports every compressor there is."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_WIDTH)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are raised, to be reported like all others."""

    def error(self, message: str) -> NoReturn:
        raise InvalidInputError(f"{message} ({self.prog} --help)")


def parse(argv: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """The command that was chosen, and its arguments.

    Raises:
        InvalidInputError: what cannot be understood.
        SystemExit: after `--help` or `--version`.
    """
    top = _top_parser()
    found = top.parse_args(_glued(argv))
    name = found.command or ""
    command = COMMANDS.get(name) or _of_another_package(name)
    if command is None:
        raise InvalidInputError(_no_command(name))
    parser = _new_parser(
        prog=f"{PROGRAM} {name}",
        usage=None if command.usage is None else f"{PROGRAM} {command.usage}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog=command.manual,
        # A command of another module may have an option of the same name, and means its own.
        conflict_handler="resolve",
    )
    _add_common(parser)
    command.add_arguments(parser)
    words = found.words
    del found.words
    return command, parser.parse_intermixed_args(words, found)


def _top_parser() -> argparse.ArgumentParser:
    width = _name_width()
    names = "\n".join(f"  {name:<{width}}{each.summary}" for name, each in COMMANDS.items())
    parser = _TopParser(
        formatter_class=_Manual,
        allow_abbrev=False,
        prog=PROGRAM,
        usage=f"{PROGRAM} [OPTIONS] COMMAND ...",
        description=f"{_PURPOSE}\n\ncommands:\n{names}\n\n{_EXAMPLES}",
    )
    _add_common(parser)
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


class _TopParser(_Parser):
    """Names the commands of other packages when its help is asked for; finding them takes a while."""

    def format_help(self) -> str:
        from hf_async_store.cli.extensions import summaries

        found = {**dict.fromkeys(ELSEWHERE, ""), **summaries()}
        lines = [
            f"  {name:<{_name_width()}}{summary or _install(name)}"
            for name, summary in sorted(found.items())
        ]
        self.epilog = "commands of other packages:\n" + "\n".join(lines) + f"\n\n{_MANUAL}"
        return super().format_help()


def _of_another_package(name: str) -> Command | None:
    if not name:
        return None
    from hf_async_store.cli.extensions import find

    return find(name)


def _install(name: str) -> str:
    return f"not installed: pip install {ELSEWHERE[name]}"


def _name_width() -> int:
    return max(map(len, COMMANDS)) + 2


def _new_parser(**options: Any) -> _Parser:
    return _Parser(formatter_class=_Manual, allow_abbrev=False, **options)


class _Version(argparse.Action):
    """`--version`, which asks the package only when it is wanted."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:  # noqa: A002
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        from hf_async_store import __version__

        # What was asked for goes to stdout; the parser's own exit would write to stderr.
        line(f"{PROGRAM} {__version__}")
        parser.exit(0)


class _Once(argparse.Action):
    """An option that discards data: the last of several would not be what was meant."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "given twice")
        setattr(namespace, self.dest, values)


def _no_command(name: str) -> str:
    known = ", ".join(COMMANDS)
    if not name:
        return f"say what to do: {known} ({PROGRAM} --help)"
    if name in ELSEWHERE:
        return f"{name!r} is a command of another package, {_install(name)}"
    from difflib import get_close_matches

    close = get_close_matches(name, COMMANDS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"no command {name!r}; there are: {known}{hint}"


def _glued(argv: Sequence[str]) -> list[str]:
    """`--order -name` as `--order=-name`, which argparse would take for another option."""
    words = list(argv)
    for index in range(len(words) - 1, 0, -1):
        if words[index - 1] == "--order" and re.match(r"-\w|-\[", words[index]):
            words[index - 1 : index + 1] = [f"--order={words[index]}"]
    return words


# -- arguments ------------------------------------------------------------------------------


def _add_common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options of every command")
    group.add_argument("--store", metavar="URL", help="the store, as a URL")
    group.add_argument("--config", metavar="FILE", help="the store, as a configuration file")
    group.add_argument(
        "--collections",
        metavar="MODULE:NAME",
        help="your own collections: NAME in MODULE, found from the working directory, holds them",
    )
    group.add_argument("--timeout", metavar="SECONDS", type=_seconds, help="give up after so long")
    group.add_argument("--json", action="store_true", help="JSON lines also on a terminal")
    group.add_argument("--verbose", action="store_true", help="show where an error came from")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return seconds


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {text!r}")
    return int(text)


def _at_least_one(text: str) -> int:
    number = _count(text)
    if not number:
        raise argparse.ArgumentTypeError("expected a number >= 1, got '0'")
    return number


def _version(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a version, a number >= 0, got {text!r}")
    return int(text)


def _version_or_absent(text: str) -> int | str:
    return text if text == "absent" else _version(text)


def _add_collection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "collection", metavar="COLLECTION", help="templates, requests, machines, or your own"
    )


def _put(parser: argparse.ArgumentParser) -> None:
    _add_collection(parser)
    parser.add_argument(
        "source", metavar="JSON | -", nargs="?", help="the JSON itself, or - for stdin"
    )
    parser.add_argument("--file", metavar="FILE", help="a file with the JSON")
    parser.add_argument("--create", action="store_true", help="refuse what is there already")
    parser.add_argument(
        "--expected-version",
        metavar="N|absent",
        type=_version_or_absent,
        help="refuse if another version is stored; absent: if anything is",
    )


def _get(parser: argparse.ArgumentParser) -> None:
    _add_collection(parser)
    parser.add_argument("ids", metavar="ID", nargs="+", help="one id or several")


def _update(parser: argparse.ArgumentParser) -> None:
    _add_collection(parser)
    parser.add_argument("id", metavar="ID", help="which entity")
    parser.add_argument("changes", metavar="FIELD=VALUE | JSON", nargs="*", help="what to set")
    parser.add_argument(
        "--remove",
        metavar="FIELD",
        action="append",
        default=[],
        help="remove a field; repeatable",
    )
    _add_expected_version(parser)


def _delete(parser: argparse.ArgumentParser) -> None:
    _get(parser)
    _add_expected_version(parser)


def _add_expected_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--expected-version", metavar="N", type=_version, help="refuse if another one is stored"
    )


def _add_filters(parser: argparse.ArgumentParser) -> None:
    _add_collection(parser)
    parser.add_argument("filters", metavar="FILTER", nargs="*", help="all must match; see below")


def _query(parser: argparse.ArgumentParser) -> None:
    _add_filters(parser)
    parser.add_argument(
        "--order",
        metavar="NAME|-NAME",
        action="append",
        default=[],
        help="smallest first, or greatest first with -; several with commas",
    )
    parser.add_argument("--limit", metavar="N", type=_count, help="maximum number of rows")
    parser.add_argument("--fields", metavar="A,B", help="only these, with the key and version")
    parser.add_argument(
        "--explain", action="store_true", help="show how it would be answered, and do not"
    )


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recover-from",
        action=_Once,
        metavar="file|journal|salvage",
        choices=("file", "journal", "salvage"),
        help="recover a store whose files do not match, from the data file, from its journal, or "
        "from what can be read of a damaged journal",
    )


def _backup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "destination",
        metavar="DESTINATION",
        nargs="?",
        help="a new file or folder, or a folder for a dated one (default: the configuration's "
        "migration.backup_location, which is backups/)",
    )
    parser.add_argument(
        "--keep", metavar="N", type=_at_least_one, help="keep only the last N dated backups there"
    )
    parser.add_argument(
        "--allow-smaller",
        action="store_true",
        help="with --keep: remove older backups also where they hold far more than what stays",
    )
    parser.add_argument(
        "--copy", action="store_true", help="a copy of the data files instead (JSON stores)"
    )
    _add_leave_out(parser)


def _add_leave_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--leave-out",
        metavar="NAME",
        action="append",
        default=[],
        help="a collection (jobs) or field (machines.owner) that is stored, not declared, and may "
        "stay behind; repeatable. Others are refused",
    )


def _restore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a backup: a file, or a folder of files")
    _add_merge(parser)
    _add_leave_out(parser)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--merge",
        metavar="RULE",
        choices=("keep", "replace", "newest"),
        help="what counts where both have an entity: keep, replace, or newest (by updated_at)",
    )


def _add_pair(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--from", dest="source", metavar="URL", required=required, help="the source"
    )
    parser.add_argument("--to", dest="target", metavar="URL", required=required, help="the target")


def _migrate(parser: argparse.ArgumentParser) -> None:
    _add_pair(parser, required=True)
    _add_migration(parser)


def _migrate_repository(parser: argparse.ArgumentParser) -> None:
    types = "json, sql, sqlite, postgresql, dynamodb"
    parser.add_argument("--source-type", metavar="TYPE", required=True, help=types)
    parser.add_argument("--target-type", metavar="TYPE", required=True, help=types)
    parser.add_argument("--source-config", metavar="FILE", help="the source's own configuration")
    parser.add_argument("--target-config", metavar="FILE", help="the target's own configuration")
    _add_migration(parser)


def _add_migration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", metavar="N", type=_at_least_one, help="entities in a batch")
    parser.add_argument("--workers", metavar="N", type=_at_least_one, help="batches at once")
    parser.add_argument("--backup-location", metavar="PATH", help="a file, or a folder with a /")
    parser.add_argument("--no-backup", action="store_true", help="make no backup first")
    parser.add_argument("--no-verify", action="store_true", help="do not compare afterwards")
    parser.add_argument(
        "--cleanup-source", action="store_true", help="empty the source once all is verified"
    )
    _add_merge(parser)
    _add_leave_out(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--dry-run", action="store_true", help="write nothing, report what is incompatible"
    )
    how.add_argument("--resume", action="store_true", help="go on from the last checkpoint")


def _live_migrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", metavar="ACTION", choices=("start", "status", "rollback", "abort", "finalize")
    )
    _add_pair(parser, required=True)
    parser.add_argument(
        "--rate", metavar="N", type=_at_least_one, default=5000, help="entities a second, at most"
    )
    parser.add_argument(
        "--no-cut-over", action="store_true", help="copy and verify only; start again to cut over"
    )


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backup", metavar="BACKUP", nargs="?", help="a file that `backup` made")
    _add_pair(parser, required=False)
    _add_leave_out(parser)


def _nothing(parser: argparse.ArgumentParser) -> None:
    pass


ELSEWHERE: Final = dict.fromkeys(("bench", "advise", "demo"), "hf-async-store-bench")
"""Commands that a package of ours adds by an entry point; what to install for each."""

_CLI: Final = "hf_async_store.cli"

COMMANDS: Final[Mapping[str, Command]] = {
    "init": Command(
        "init",
        "make an empty store where there is none",
        f"{_CLI}.admin_commands:init",
        _nothing,
        "What is there already stays as it is, so it may be called again and again.\n\n"
        f"  {PROGRAM} --store json:data/request_database.json init\n",
    ),
    "put": Command(
        "put COLLECTION [JSON | -] [OPTIONS]",
        "store entities: insert them, or replace what is there",
        f"{_CLI}.entity_commands:put",
        _put,
        "The JSON is one object, a list of objects, or one object a line. The key field in each\n"
        "(as machine_id) holds its id. Fields that an object does not name are gone afterwards;\n"
        "`update` changes single fields. If one cannot be stored as it is, none is; beyond that,\n"
        "each is stored or refused by itself.\n\n"
        f'  {PROGRAM} put templates \'{{"template_id": "t-1", "name": "Standard"}}\'\n'
        f"  {PROGRAM} put machines --file machines.jsonl --create\n"
        f"  {PROGRAM} query machines | {PROGRAM} put machines - --store json:copy.json\n",
    ),
    "get": Command(
        "get COLLECTION ID...",
        "show entities by id",
        f"{_CLI}.entity_commands:get",
        _get,
        "Exit code 1 if any of them is not there; the others are shown.\n\n"
        f"  {PROGRAM} get machines m-1 m-2\n"
        f"  {PROGRAM} get machines -- -id-that-begins-with-a-dash\n",
    ),
    "update": Command(
        "update COLLECTION ID [FIELD=VALUE... | JSON] [OPTIONS]",
        "change single fields of an entity that is there",
        f"{_CLI}.entity_commands:update",
        _update,
        "A value is read as the field's declared type, in other fields as JSON if it reads as\n"
        "such, else as text; FIELD:=JSON takes any JSON value.\n\n"
        f"  {PROGRAM} update requests req-1 status=COMPLETED completed_at=2025-06-30T12:00:00Z\n"
        f'  {PROGRAM} update requests req-1 \'tags:={{"owner": "ops"}}\' --remove note\n'
        f'  {PROGRAM} update requests req-1 \'{{"status": "FAILED"}}\' --expected-version 3\n',
    ),
    "delete": Command(
        "delete COLLECTION ID... [OPTIONS]",
        "delete entities",
        f"{_CLI}.entity_commands:delete",
        _delete,
        "Exit code 1 if any of them was not there.\n\n"
        f"  {PROGRAM} delete machines m-1 m-2\n"
        f"  {PROGRAM} delete machines m-1 --expected-version 3\n",
    ),
    "query": Command(
        "query COLLECTION [FILTER...] [OPTIONS]",
        "show the entities that match",
        f"{_CLI}.entity_commands:query",
        _query,
        f"{_FILTER_HELP}\n"
        f"  {PROGRAM} query machines request_id=req-1 status:ne=TERMINATED\n"
        f"  {PROGRAM} query requests status:in=PENDING,RUNNING --order -created_at --limit 20\n"
        f"  {PROGRAM} query machines status=RUNNING --fields private_ip,name --json\n",
    ),
    "count": Command(
        "count COLLECTION [FILTER...]",
        "count the entities that match",
        f"{_CLI}.entity_commands:count",
        _add_filters,
        f"{_FILTER_HELP}\n  {PROGRAM} count machines status=RUNNING\n",
    ),
    "health": Command(
        "health",
        "check that the store can be used: write, read, room, files",
        f"{_CLI}.admin_commands:health",
        _nothing,
        "Exit code 4 if anything is wrong.\n",
    ),
    "describe": Command(
        "describe",
        "show collections, capabilities and configuration",
        f"{_CLI}.admin_commands:describe",
        _nothing,
        "Passwords are not shown. Tables that are made once (DynamoDB stores) are shown as they are,\n"
        "beside what is declared; each difference is reported on stderr.\n",
    ),
    "create-tables": Command(
        "create-tables",
        "make the tables and indexes that are missing (DynamoDB stores)",
        f"{_CLI}.admin_commands:create_tables",
        _nothing,
        "Waits until they are active, and sets auto scaling and point-in-time recovery as they\n"
        "are configured. Tables are also made at their first use; an index that is missing on a\n"
        "table that is there is made by this command alone, because that may take long.\n",
    ),
    "checkpoint": Command(
        "checkpoint [OPTIONS]",
        "bring everything into the data files (JSON stores)",
        f"{_CLI}.admin_commands:checkpoint",
        _checkpoint,
        "Afterwards the files may be read by other programs: nothing waits in the journal.\n"
        "A data file that was replaced by hand, while the journal held commits, is refused until one\n"
        "is chosen. What is discarded is deleted, so make a copy of the folder first.\n\n"
        "  --recover-from file     the data file as it is; the journal is discarded\n"
        "  --recover-from journal  the commits in the journal, applied to the data file\n"
        "  --recover-from salvage  for a damaged journal: every commit before the damage; the\n"
        "                          journal is kept as NAME.damaged.NUMBER\n",
    ),
    "backup": Command(
        "backup [DESTINATION] [OPTIONS]",
        "write everything to one file while the store is in use",
        f"{_CLI}.backups:backup",
        _backup,
        "The file is the same whatever engine the store has: JSON lines, gzip, with a digest. It\n"
        "holds one moment of the store, where the engine can show one (`describe`).\n\n"
        f"  {PROGRAM} backup\n"
        f"  {PROGRAM} backup backups/ --keep 7\n"
        f"  {PROGRAM} backup /mnt/backups/before-upgrade.jsonl.gz\n",
    ),
    "restore": Command(
        "restore SOURCE [OPTIONS]",
        "bring a backup back",
        f"{_CLI}.backups:restore",
        _restore,
        "A file that `backup` made goes into an empty store, or with --merge beside what is there;\n"
        "versions and times are as they were. It is read and proven as a whole first.\n\n"
        "For JSON stores SOURCE may also be what `backup --copy` made or `backups` lists, or any\n"
        "file in the store's form. It replaces the content, and what was in the store is kept\n"
        "beside it as replaced_TIME. A changed entity gets its next version, as by any write. If\n"
        "the store cannot be opened any more, its files are replaced, and kept in damaged_TIME.\n\n"
        f"  {PROGRAM} restore backups/backup_20250630T120000Z.jsonl.gz\n"
        f"  {PROGRAM} restore monday.jsonl.gz --merge newest\n"
        f"  {PROGRAM} restore data/request_database.json.bak.00000012\n",
    ),
    "backups": Command(
        "backups",
        "list the older files that the store kept by itself (JSON stores)",
        f"{_CLI}.backups:backups",
        _nothing,
        f"Newest first; each can be given to `{PROGRAM} restore`.\n",
    ),
    "migrate": Command(
        "migrate --from URL --to URL [OPTIONS]",
        "move everything to another store, and verify that nothing changed",
        f"{_CLI}.migrate_commands:migrate",
        _migrate,
        "Neither store may be written to meanwhile. First a backup of the source is made, then\n"
        "batches are copied, then both sides are compared. Whatever goes wrong, the source is as\n"
        "it was. --config FILE gives the `migration` block; options on the command line win.\n\n"
        f"  {PROGRAM} migrate --from json:data --to json:data.json --dry-run\n"
        f"  {PROGRAM} migrate --from json:data --to json:data.json\n"
        f"  {PROGRAM} migrate --from json:data --to json:data.json --resume\n",
    ),
    "migrateRepository": Command(
        "migrateRepository --source-type TYPE --target-type TYPE [OPTIONS]",
        "the same, by the types of stores in a configuration file",
        f"{_CLI}.migrate_commands:migrate_repository",
        _migrate_repository,
        "--config FILE (or the environment) has a block for each type; where both are of one type,\n"
        "--source-config and --target-config name a file each.\n\n"
        f"  {PROGRAM} migrateRepository --source-type json --target-type sql --batch-size 100 \\\n"
        "      --config config.json\n",
    ),
    "live-migrate": Command(
        "live-migrate ACTION --from URL --to URL [OPTIONS]",
        "migrate to another store while applications use it",
        f"{_CLI}.live_migrate_command:live_migrate",
        _live_migrate,
        "  start     copy everything, follow the changes, verify, and switch to the target\n"
        "  status    show the phase and the changes that are still to be copied\n"
        "  rollback  switch back to the source, with everything that was written since\n"
        "  abort     end the migration before the switch\n"
        "  finalize  decommission the source: it then refuses to open, and names the target\n\n"
        "Applications may use either store, before and after, and follow by themselves, if the key\n"
        "`follow_moves` of their configuration names the other one. What is recorded in the stores\n"
        "is only their location, without secrets. Run an interrupted action again.\n\n"
        f"  {PROGRAM} live-migrate start --from json:data --to json:data.json\n"
        f"  {PROGRAM} live-migrate finalize --from json:data --to json:data.json\n",
    ),
    "verify": Command(
        "verify --from URL --to URL | verify BACKUP",
        "compare two stores, or verify a backup file",
        f"{_CLI}.migrate_commands:verify",
        _verify,
        "Exit code 3 if anything differs; what differs is named by id and field.\n\n"
        f"  {PROGRAM} verify --from json:data --to json:data.json\n"
        f"  {PROGRAM} verify backups/backup_20250630T120000Z.jsonl.gz\n",
    ),
}
