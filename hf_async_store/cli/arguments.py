"""The commands, their arguments and their manual.

Arguments are parsed in two steps: a first parser finds the command, and then only the parser of that
command is created, which keeps the start fast. It also allows the options and positional arguments of
a command in any order.
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
the store: give --store URL or --config FILE, or set the environment variable {STORE_VARIABLE} to a
URL or to the path of a configuration file. Options may be given before or after the command.

  json:data/request_database.json    one JSON file
  json:data                          a folder with a JSON file for each collection

  Take passwords from environment variables: '...://app:${{DB_PASSWORD}}@host/name', in single quotes,
  so that the command and not the shell inserts the value.

On a terminal, results are shown as tables and indented JSON; otherwise, or with --json, as one JSON
value per line. Messages are written to stderr, one line each.

exit codes:
  0    success
  1    not found: an entity, a backup, or the store itself
  2    wrong usage or configuration
  3    conflict: another version, already exists, references, target holds other data, stores differ
  4    the store failed, or `health` found problems
  130  interrupted (Ctrl-C)
  141  broken pipe
"""

_PURPOSE: Final = "Store templates, requests, machines and your own collections in one store."

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
A filter is FIELD=VALUE, FIELD:OPERATOR=VALUE, or FIELD:=JSON. An entity must match all filters.

  status=RUNNING          equal to a value
  count:between=1,10      between two values, both included
  status:in=A,B           one of several values
  tags/owner=ops          a value inside an object
  disks/0/size:gte=100    a value inside a list, by index
  done_at:exists=false    the field is missing (a field that is null is not missing)
  name:=null              any JSON value after :=
  '["a/b:c"]=x'           a field name that contains / : or =, as a JSON list of path steps

  operators: eq ne lt lte gt gte in not_in between exists contains begins_with

A value is read as the declared type of its field. If the field is of type json, or not declared,
the value is read as JSON if it is valid JSON, otherwise as a string: zone=7 compares with the
number 7, zone:='"7"' with the string "7".
"""


class _Manual(argparse.RawDescriptionHelpFormatter):
    """Formats help with a fixed width: determining that of the terminal imports `shutil`, and with
    it all compression modules."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_WIDTH)


class _Parser(argparse.ArgumentParser):
    """A parser that raises errors, so that they are reported like all others."""

    def error(self, message: str) -> NoReturn:
        raise InvalidInputError(f"{message} (see {self.prog} --help)")


def parse(argv: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """The chosen command and its arguments.

    Raises:
        InvalidInputError: the arguments are not valid.
        SystemExit: after `--help` or `--version`.
    """
    arguments = _top_parser().parse_args(_join_order(argv))
    name = arguments.command or ""
    command = COMMANDS.get(name) or _of_another_package(name)
    if command is None:
        raise InvalidInputError(_no_command(name))
    parser = _new_parser(
        prog=f"{PROGRAM} {name}",
        usage=None if command.usage is None else f"{PROGRAM} {command.usage}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog=command.manual,
        # A command of another package may replace a common option by its own.
        conflict_handler="resolve",
    )
    _add_common(parser, *_STORE_HELP.get(name, ()))
    command.add_arguments(parser)
    words = arguments.words
    del arguments.words
    return command, parser.parse_intermixed_args(words, arguments)


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
    """Lists the commands of other packages in its help only, because finding them takes a while."""

    def format_help(self) -> str:
        from hf_async_store.cli.extensions import summaries

        known = {**dict.fromkeys(EXTERNAL_COMMANDS, ""), **summaries()}
        lines = [
            f"  {name:<{_name_width()}}{summary or _install_hint(name)}"
            for name, summary in sorted(known.items())
        ]
        self.epilog = "commands of other packages:\n" + "\n".join(lines) + f"\n\n{_MANUAL}"
        return super().format_help()


def _of_another_package(name: str) -> Command | None:
    if not name:
        return None
    from hf_async_store.cli.extensions import find

    return find(name)


def _install_hint(name: str) -> str:
    return f"not installed: pip install {EXTERNAL_COMMANDS[name]}"


def _name_width() -> int:
    return max(map(len, COMMANDS)) + 2


def _new_parser(**options: Any) -> _Parser:
    return _Parser(formatter_class=_Manual, allow_abbrev=False, **options)


class _Version(argparse.Action):
    """`--version`, which imports the package version only when it is needed."""

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

        # Written to stdout here, because `exit` with a message would write to stderr.
        line(f"{PROGRAM} {__version__}")
        parser.exit(0)


class _Once(argparse.Action):
    """An option that may be given only once, because it discards data."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "it may be given only once")
        setattr(namespace, self.dest, values)


def _no_command(name: str) -> str:
    from hf_async_store.cli.extensions import names

    commands = list(dict.fromkeys((*COMMANDS, *EXTERNAL_COMMANDS, *names())))
    known = ", ".join(commands)
    if not name:
        return f"no command is given; the commands are {known} (see {PROGRAM} --help)"
    if name in EXTERNAL_COMMANDS:
        return f"{name!r} is a command of another package, which is {_install_hint(name)}"
    from difflib import get_close_matches

    close = get_close_matches(name, commands, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown command {name!r}; the commands are {known}{hint}"


def _join_order(argv: Sequence[str]) -> list[str]:
    """Replace `--order -name` by `--order=-name`: argparse would take `-name` for another option."""
    words = list(argv)
    for index in range(len(words) - 1, 0, -1):
        if words[index - 1] == "--order" and re.match(r"-\w|-\[", words[index]):
            words[index - 1 : index + 1] = [f"--order={words[index]}"]
    return words


# -- arguments ------------------------------------------------------------------------------


def _add_common(
    parser: argparse.ArgumentParser,
    store: str = "the URL of the store",
    config: str = "the configuration file of the store",
) -> None:
    """Add the common options; `store` and `config` are the help texts of these two."""
    group = parser.add_argument_group("options of every command")
    group.add_argument("--store", metavar="URL", help=store)
    group.add_argument("--config", metavar="FILE", help=config)
    group.add_argument(
        "--collections",
        metavar="MODULE:NAME",
        help="your own collections: NAME in the Python module MODULE is a Collection, or a list of "
        "them; MODULE may be in the working directory",
    )
    group.add_argument(
        "--timeout", metavar="SECONDS", type=_seconds, help="fail after this number of seconds"
    )
    group.add_argument("--json", action="store_true", help="write JSON lines also to a terminal")
    group.add_argument("--verbose", action="store_true", help="show tracebacks of errors")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds > 0, got {text!r}")
    return seconds


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer >= 0, got {text!r}")
    return int(text)


def _at_least_one(text: str) -> int:
    number = _count(text)
    if not number:
        raise argparse.ArgumentTypeError("expected an integer >= 1, got '0'")
    return number


def _version(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a version, an integer >= 0, got {text!r}")
    return int(text)


def _version_or_absent(text: str) -> int | str:
    return text if text == "absent" else _version(text)


def _add_collection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "collection",
        metavar="COLLECTION",
        help="templates, requests, machines, or one of your own",
    )


def _put(parser: argparse.ArgumentParser) -> None:
    _add_collection(parser)
    parser.add_argument(
        "source", metavar="JSON | -", nargs="?", help="the JSON itself, or - to read stdin"
    )
    parser.add_argument("--file", metavar="FILE", help="read the JSON from a file")
    parser.add_argument("--create", action="store_true", help="refuse entities that exist already")
    parser.add_argument(
        "--expected-version",
        metavar="N|absent",
        type=_version_or_absent,
        help="write only if the stored entity has version N; absent: only if it does not exist",
    )


def _get(parser: argparse.ArgumentParser) -> None:
    _add_collection(parser)
    parser.add_argument("ids", metavar="ID", nargs="+", help="one or more ids")


def _update(parser: argparse.ArgumentParser) -> None:
    _add_collection(parser)
    parser.add_argument("id", metavar="ID", help="the id of the entity")
    parser.add_argument(
        "changes",
        metavar="FIELD=VALUE | JSON",
        nargs="*",
        help="the fields to set, or one JSON object with them",
    )
    parser.add_argument(
        "--remove",
        metavar="FIELD",
        action="append",
        default=[],
        help="remove a field; may be repeated",
    )
    _add_expected_version(parser)


def _delete(parser: argparse.ArgumentParser) -> None:
    _get(parser)
    _add_expected_version(parser)


def _add_expected_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--expected-version",
        metavar="N",
        type=_version,
        help="write only if the stored entity has version N",
    )


def _add_filters(parser: argparse.ArgumentParser) -> None:
    _add_collection(parser)
    parser.add_argument(
        "filters", metavar="FILTER", nargs="*", help="a condition, see below; all must match"
    )


def _query(parser: argparse.ArgumentParser) -> None:
    _add_filters(parser)
    parser.add_argument(
        "--order",
        metavar="NAME|-NAME",
        action="append",
        default=[],
        help="sort by a field, ascending, or descending with -; separate several fields by commas",
    )
    parser.add_argument("--limit", metavar="N", type=_count, help="maximum number of entities")
    parser.add_argument(
        "--fields", metavar="A,B", help="show only these fields, the key and the version"
    )
    parser.add_argument(
        "--explain", action="store_true", help="show the query plan instead of running the query"
    )


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recover-from",
        action=_Once,
        metavar="file|journal|salvage",
        choices=("file", "journal", "salvage"),
        help="recover a store whose data file and journal do not match, or whose journal is damaged; "
        "see below",
    )


def _backup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "destination",
        metavar="DESTINATION",
        nargs="?",
        help="a new file, or an existing folder or path ending in / for a file with a dated name "
        "(default: migration.backup_location of the configuration, which is backups/ if not set)",
    )
    parser.add_argument(
        "--keep",
        metavar="N",
        type=_at_least_one,
        help="delete all but the newest N dated backups (backup_TIME.jsonl.gz) in the folder, whichever "
        "store they are of",
    )
    parser.add_argument(
        "--allow-smaller",
        action="store_true",
        help="with --keep: delete older backups even if they hold far more than the remaining ones",
    )
    parser.add_argument(
        "--copy",
        action="store_true",
        help="copy the data files to a new file or folder instead (JSON stores)",
    )
    _add_leave_out(parser)


def _add_leave_out(
    parser: argparse.ArgumentParser,
    what: str = "that is stored but not declared",
    otherwise: str = "If anything else undeclared is stored, the command fails and writes nothing",
) -> None:
    parser.add_argument(
        "--leave-out",
        metavar="NAME",
        action="append",
        default=[],
        help=f"exclude a collection (jobs) or field (machines.owner) {what}; may be repeated. "
        f"{otherwise}",
    )


def _restore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a backup: a file, or a folder of files")
    _add_merge(parser)
    _add_leave_out(
        parser,
        "that the backup contains but that is not declared",
        "If the backup contains anything else undeclared, the command fails and writes nothing",
    )


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--merge",
        metavar="keep|replace|newest",
        choices=("keep", "replace", "newest"),
        help="if an entity exists already and differs: keep the existing one, replace it, or store "
        "the one with the newest updated_at",
    )


def _add_pair(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--from", dest="source", metavar="URL", required=required, help="the source store"
    )
    parser.add_argument(
        "--to", dest="target", metavar="URL", required=required, help="the target store"
    )


def _migrate(parser: argparse.ArgumentParser) -> None:
    _add_pair(parser, required=True)
    _add_migration(parser)


def _migrate_repository(parser: argparse.ArgumentParser) -> None:
    types = "json, sql, sqlite, postgresql or dynamodb"
    parser.add_argument("--source-type", metavar="TYPE", required=True, help=types)
    parser.add_argument("--target-type", metavar="TYPE", required=True, help=types)
    parser.add_argument(
        "--source-config", metavar="FILE", help="the configuration file of the source"
    )
    parser.add_argument(
        "--target-config", metavar="FILE", help="the configuration file of the target"
    )
    _add_migration(parser)


def _add_migration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size", metavar="N", type=_at_least_one, help="number of entities in a batch"
    )
    parser.add_argument(
        "--workers", metavar="N", type=_at_least_one, help="number of batches written at once"
    )
    parser.add_argument(
        "--backup-location",
        metavar="PATH",
        help="the backup file, or, ending in /, the folder for it; the progress file is stored there, too",
    )
    parser.add_argument("--no-backup", action="store_true", help="do not back up the source first")
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare the stores afterwards"
    )
    parser.add_argument(
        "--cleanup-source",
        action="store_true",
        help="empty the source after the verification, including entities that --merge keep or newest did "
        "not copy",
    )
    _add_merge(parser)
    _add_leave_out(parser)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing, not even a test write; report what the target would refuse",
    )
    mode.add_argument("--resume", action="store_true", help="continue an interrupted migration")


def _live_migrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        metavar="ACTION",
        choices=("start", "status", "rollback", "abort", "finalize"),
        help="start, status, rollback, abort or finalize; see below",
    )
    _add_pair(parser, required=True)
    parser.add_argument(
        "--rate",
        metavar="N",
        type=_at_least_one,
        default=5000,
        help="maximum number of entities copied per second (default: 5000)",
    )
    parser.add_argument(
        "--no-cut-over",
        action="store_true",
        help="copy and verify, but do not switch; run `start` again to switch",
    )


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "backup", metavar="BACKUP", nargs="?", help="a portable backup file, made by `backup`"
    )
    _add_pair(parser, required=False)
    _add_leave_out(parser)


def _nothing(parser: argparse.ArgumentParser) -> None:
    pass


EXTERNAL_COMMANDS: Final = dict.fromkeys(("bench", "advise", "demo"), "hf-async-store-bench")
"""Commands that another package of this project adds, and the name of that package."""

_STORE_HELP: Final[Mapping[str, tuple[str, str]]] = {
    "migrate": ("not used: see --from and --to", "read the `migration` block from this file"),
    "migrateRepository": (
        "not used: see --source-type and --target-type",
        "the configuration file, with a block for each of the two types",
    ),
    "live-migrate": ("not used: see --from and --to", "not used: see --from and --to"),
    "verify": ("not used: see --from, --to and BACKUP", "not used: see --from, --to and BACKUP"),
}
"""The help of --store and --config for commands that do not work on one store."""

_CLI: Final = "hf_async_store.cli"

COMMANDS: Final[Mapping[str, Command]] = {
    "init": Command(
        "init",
        "create an empty store, if none exists",
        f"{_CLI}.admin_commands:init",
        _nothing,
        "An existing store is not changed, so the command may be repeated.\n\n"
        f"  {PROGRAM} --store json:data/request_database.json init\n",
    ),
    "put": Command(
        "put COLLECTION [JSON | -] [OPTIONS]",
        "insert entities, or replace existing ones",
        f"{_CLI}.entity_commands:put",
        _put,
        "The JSON is one object, a list of objects, or one object per line. The key field of each\n"
        "object (such as machine_id) holds its id. An existing entity is replaced as a whole;\n"
        "`update` changes single fields. If an object is not valid, nothing is written. Otherwise\n"
        "each entity is stored or refused independently of the others.\n\n"
        f'  {PROGRAM} put templates \'{{"template_id": "t-1", "name": "Standard"}}\'\n'
        f"  {PROGRAM} put machines --file machines.jsonl --create\n"
        f"  {PROGRAM} query templates | {PROGRAM} put templates - --store json:copy.json\n",
    ),
    "get": Command(
        "get COLLECTION ID...",
        "show entities by id",
        f"{_CLI}.entity_commands:get",
        _get,
        "If an entity does not exist, the exit code is 1; the others are shown.\n\n"
        f"  {PROGRAM} get machines m-1 m-2\n"
        f"  {PROGRAM} get machines -- -id-that-begins-with-a-dash\n",
    ),
    "update": Command(
        "update COLLECTION ID [FIELD=VALUE... | JSON] [OPTIONS]",
        "change single fields of an existing entity",
        f"{_CLI}.entity_commands:update",
        _update,
        "A value is read as the declared type of its field. If the field is of type json, or not\n"
        "declared, the value is read as JSON if it is valid JSON, otherwise as a string.\n"
        "FIELD:=JSON sets any JSON value.\n\n"
        f"  {PROGRAM} update requests req-1 status=COMPLETED completed_at=2025-06-30T12:00:00Z\n"
        f'  {PROGRAM} update requests req-1 \'tags:={{"owner": "ops"}}\' --remove note\n'
        f'  {PROGRAM} update requests req-1 \'{{"status": "FAILED"}}\' --expected-version 3\n',
    ),
    "delete": Command(
        "delete COLLECTION ID... [OPTIONS]",
        "delete entities",
        f"{_CLI}.entity_commands:delete",
        _delete,
        "If an entity does not exist, the exit code is 1; the others are deleted.\n\n"
        f"  {PROGRAM} delete machines m-1 m-2\n"
        f"  {PROGRAM} delete machines m-1 --expected-version 3\n",
    ),
    "query": Command(
        "query COLLECTION [FILTER...] [OPTIONS]",
        "show the entities that match all filters",
        f"{_CLI}.entity_commands:query",
        _query,
        f"{_FILTER_HELP}\n"
        f"  {PROGRAM} query machines request_id=req-1 status:ne=TERMINATED\n"
        f"  {PROGRAM} query requests status:in=PENDING,RUNNING --order -created_at --limit 20\n"
        f"  {PROGRAM} query machines status=RUNNING --fields private_ip,name --json\n",
    ),
    "count": Command(
        "count COLLECTION [FILTER...]",
        "count the entities that match all filters",
        f"{_CLI}.entity_commands:count",
        _add_filters,
        f"{_FILTER_HELP}\n  {PROGRAM} count machines status=RUNNING\n",
    ),
    "health": Command(
        "health",
        "check that the store works: writing, reading, free space, files",
        f"{_CLI}.admin_commands:health",
        _nothing,
        "If there is a problem, the exit code is 4, and each problem is reported on stderr.\n",
    ),
    "describe": Command(
        "describe",
        "show collections, capabilities and configuration",
        f"{_CLI}.admin_commands:describe",
        _nothing,
        "Passwords are not shown. For DynamoDB stores, the existing tables are shown, too; each\n"
        "difference between them and the declarations is reported on stderr.\n",
    ),
    "create-tables": Command(
        "create-tables",
        "create missing tables and indexes (DynamoDB stores)",
        f"{_CLI}.admin_commands:create_tables",
        _nothing,
        "Waits until the tables and indexes are active, and sets auto scaling and point-in-time\n"
        "recovery as configured. Missing tables are also created by the first write. Missing\n"
        "indexes of existing tables are created only by this command, because that may take long.\n",
    ),
    "checkpoint": Command(
        "checkpoint [OPTIONS]",
        "write all commits from the journal to the data files (JSON stores)",
        f"{_CLI}.admin_commands:checkpoint",
        _checkpoint,
        "Until the next commit, the data files are then complete, and other programs can read or copy\n"
        "them. To edit or replace a data file, first stop all other processes, then run this command.\n\n"
        "If a data file was replaced by hand while the journal held commits, the store cannot be\n"
        "used until --recover-from file or journal is given. Copy the folder first: both delete the\n"
        "journal without a copy. The data file as it was is kept as NAME.bak.NUMBER, unless\n"
        "backup_enabled is off.\n\n"
        "  --recover-from file     use the data file as it is, and delete the journal: all commits\n"
        "                          since the last compaction are lost\n"
        "  --recover-from journal  apply the commits in the journal to the data file\n"
        "  --recover-from salvage  if the journal is damaged, and there is no backup to restore: apply\n"
        "                          every commit before the damage; all later ones are lost. A copy of\n"
        "                          the journal is kept as NAME.damaged.NUMBER\n",
    ),
    "backup": Command(
        "backup [DESTINATION] [OPTIONS]",
        "write the whole content to one file; the store may be in use",
        f"{_CLI}.backup_commands:backup",
        _backup,
        "The format is the same for every engine: gzip-compressed JSON lines with digests. The backup\n"
        "is a snapshot of the store, if the engine supports snapshots (see `describe`).\n\n"
        f"  {PROGRAM} backup\n"
        f"  {PROGRAM} backup backups/ --keep 7\n"
        f"  {PROGRAM} backup /mnt/backups/before-upgrade.jsonl.gz\n",
    ),
    "restore": Command(
        "restore SOURCE [OPTIONS]",
        "restore a backup",
        f"{_CLI}.backup_commands:restore",
        _restore,
        "A portable backup, made by `backup`, is restored into an empty store, or with --merge into\n"
        "one that holds entities already, with the original versions and timestamps. The whole file\n"
        "is verified before anything is written. If it is interrupted, run it again: with --merge\n"
        "replace if it had no rule, otherwise with the same rule.\n\n"
        "For JSON stores SOURCE may also be a copy made by `backup --copy`, a file listed by\n"
        "`backups`, or any file in the format of the store. It replaces the content; --merge is refused.\n"
        "The previous content is kept next to the data as replaced_TIME. Entities that change get\n"
        "their next version, as with any write. If the store is damaged and cannot be opened, its\n"
        "files are replaced, and kept in damaged_TIME.\n\n"
        f"  {PROGRAM} restore backups/backup_20250630T120000Z.jsonl.gz\n"
        f"  {PROGRAM} restore monday.jsonl.gz --merge newest\n"
        f"  {PROGRAM} restore data/request_database.json.bak.00000012\n",
    ),
    "backups": Command(
        "backups",
        "list the earlier data files kept by JSON stores (not portable backups)",
        f"{_CLI}.backup_commands:backups",
        _nothing,
        f"The newest is listed first. `{PROGRAM} restore` restores any of them.\n",
    ),
    "migrate": Command(
        "migrate --from URL --to URL [OPTIONS]",
        "copy everything to another store, and verify that both are equal",
        f"{_CLI}.migrate_commands:migrate",
        _migrate,
        "No other program may write to either store meanwhile. First the source is backed up, then\n"
        "it is copied in batches, then both stores are compared. Whatever error occurs until then,\n"
        "the source is unchanged. The `migration` block is read from --config FILE, or else from the\n"
        "configuration of the source; options on the command line take precedence.\n\n"
        f"  {PROGRAM} migrate --from json:data --to json:data.json --dry-run\n"
        f"  {PROGRAM} migrate --from json:data --to json:data.json\n"
        f"  {PROGRAM} migrate --from json:data --to json:data.json --resume\n",
    ),
    "migrateRepository": Command(
        "migrateRepository --source-type TYPE --target-type TYPE [OPTIONS]",
        "like migrate, with store types and configuration files instead of URLs",
        f"{_CLI}.migrate_commands:migrate_repository",
        _migrate_repository,
        f"The file given with --config (or {STORE_VARIABLE}) has a block for each of the two types. If\n"
        "both stores are of the same type, give --source-config and --target-config.\n\n"
        f"  {PROGRAM} migrateRepository --source-type json --target-type sql --batch-size 100 \\\n"
        "      --config config.json\n",
    ),
    "live-migrate": Command(
        "live-migrate ACTION --from URL --to URL [OPTIONS]",
        "migrate to another store while applications use it",
        f"{_CLI}.live_migrate_command:live_migrate",
        _live_migrate,
        "  start     copy everything, apply the changes made meanwhile, verify, and switch to the\n"
        "            target\n"
        "  status    show the phase and the number of changes that are still to be copied\n"
        "  rollback  switch back to the source, with everything that was written since the switch\n"
        "  abort     end the migration before the switch\n"
        "  finalize  decommission the source: from then on it refuses to open. First configure every\n"
        "            application with the URL of the target\n\n"
        "Between start and finalize, applications may open either store, if the key `follow_moves` of\n"
        "their configuration names the other one. Then they change to the active store by themselves.\n"
        "The stores record only each other's location, without secrets. If an action was interrupted,\n"
        "run it again.\n\n"
        f"  {PROGRAM} live-migrate start --from json:data --to json:data.json\n"
        f"  {PROGRAM} live-migrate finalize --from json:data --to json:data.json\n",
    ),
    "verify": Command(
        "verify --from URL --to URL | verify BACKUP",
        "compare two stores, or verify a backup file",
        f"{_CLI}.migrate_commands:verify",
        _verify,
        "If the stores differ, the exit code is 3, and the first differences are reported by id and\n"
        "field.\n\n"
        f"  {PROGRAM} verify --from json:data --to json:data.json\n"
        f"  {PROGRAM} verify backups/backup_20250630T120000Z.jsonl.gz\n",
    ),
}
