"""The commands, their arguments and their manual.

Arguments are parsed in two steps: a first parser finds the command, and then only the parser of that
command is created, which keeps the start fast. It also allows the options and positional arguments of
a command in any order.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Container, Mapping, Sequence
from typing import Any, Final, NoReturn

from hf_async_store.cli.commands import Add, Command
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

the collections: those that programs have declared for the store, which it remembers; for a new
store templates, requests and machines. Name others by --collections MODULE:NAME, the environment
variable HF_ASYNC_STORE_COLLECTIONS, or `storage.collections` of the configuration file.

On a terminal, results are shown as tables and indented JSON; otherwise, or with --json, as one JSON
value per line. Messages are written to stderr, one line each.

exit codes:
  0    success
  1    not found: an entity, a backup, or the store itself
  2    wrong usage or configuration, a wrong password included
  3    conflict: another version, already exists, references, target holds other data, stores differ
  4    the store failed, or `health` found problems
  5    `wait`: the entity did not match within --timeout
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
  '["zone"]=7'            a field that is not declared, or a value of another type than the declared

  operators: eq ne lt lte gt gte in not_in between exists contains begins_with
             contains_ignore_case begins_with_ignore_case

A value is read as the declared type of its field. If the field is of type json, or not declared,
the value is read as JSON if it is valid JSON, otherwise as a string: '["zone"]=7' compares with the
number 7, '["zone"]:="7"' with the string "7".
"""


class _Manual(argparse.RawDescriptionHelpFormatter):
    """Formats help with a fixed width: determining that of the terminal imports `shutil`, and with
    it all compression modules."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_WIDTH)


class _Parser(argparse.ArgumentParser):
    """A parser that raises errors, so that they are reported like all others."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Manual, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise InvalidInputError(f"{message} (see {self.prog} --help)")


def parse(argv: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """The chosen command and its arguments.

    Raises:
        InvalidInputError: the arguments are not valid.
        SystemExit: after `--help` or `--version`.
    """
    arguments = top_parser().parse_args(_join_order(argv))
    name = arguments.command or ""
    command = command_of(name)
    if command is None:
        raise InvalidInputError(_no_command(name))
    parser = parser_of(name, command)
    words = arguments.words
    del arguments.words
    if name == "completion" and "--" in words:
        # Another -- after this one is a word to complete, which argparse would drop.
        end = words.index("--")
        arguments = parser.parse_intermixed_args(words[:end], arguments)
        arguments.words = words[end + 1 :]
    else:
        arguments = parser.parse_intermixed_args(words, arguments)
    for option, instead in command.refused.items():
        if getattr(arguments, option) is not None:
            raise InvalidInputError(f"{name} does not take --{option}: {instead}")
    return command, arguments


def parser_of(name: str, command: Command) -> argparse.ArgumentParser:
    """The parser of one command, whose help is its page in the documentation, too."""
    parser = _Parser(
        prog=f"{PROGRAM} {name}",
        usage=None if command.usage is None else f"{PROGRAM} {command.usage}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog=command.manual,
        # A command of another package may replace a common option by its own.
        conflict_handler="resolve",
    )
    _add_common(parser, command.refused)
    for add in command.arguments:
        add(parser)
    return parser


def top_parser() -> argparse.ArgumentParser:
    """The parser that finds the command."""
    width = _name_width()
    names = "\n".join(f"  {name:<{width}}{each.summary}" for name, each in COMMANDS.items())
    parser = _TopParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [OPTIONS] COMMAND ...",
        description=f"{_PURPOSE}\n\ncommands:\n{names}\n\n{_EXAMPLES}",
    )
    _add_common(parser)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
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


def command_of(name: str) -> Command | None:
    """The command with this name, of this or of another package; None if there is none."""
    if name in COMMANDS or not name:
        return COMMANDS.get(name)
    from hf_async_store.cli.extensions import find

    return find(name)


def _install_hint(name: str) -> str:
    package = EXTERNAL_COMMANDS[name]
    return f"not installed: pip install {package} (in a checkout: pip install ./benchmarks)"


def _name_width() -> int:
    return max(map(len, COMMANDS)) + 2


class _Version(argparse.Action):
    """`--version`, which imports the package version only when it is needed."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        from hf_async_store import __version__

        # Written to stdout here, because `exit` with a message would write to stderr.
        line(f"{PROGRAM} {__version__}")
        parser.exit(0)


class _Once(argparse.Action):
    """An option that may be given only once, because it discards data."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "it may be given only once")
        setattr(namespace, self.dest, values)


_OTHER_WORDS: Final = {
    "save": "put",
    "create": "put",
    "add": "put",
    "insert": "put",
    "upsert": "put",
    "read": "get",
    "show": "get",
    "remove": "delete",
    "rm": "delete",
    "find": "query",
    "select": "query",
    "list": "query",
    "ls": "query",
}
"""The commands that are meant by other words for them."""


def _no_command(name: str) -> str:
    from hf_async_store.cli.extensions import names

    commands = list(dict.fromkeys((*COMMANDS, *names())))
    known = ", ".join(commands)
    if not name:
        return f"no command is given; the commands are {known} (see {PROGRAM} --help)"
    if name in EXTERNAL_COMMANDS:
        return f"{name!r} is a command of another package, which is {_install_hint(name)}"
    from difflib import get_close_matches

    close = [_OTHER_WORDS[name]] if name in _OTHER_WORDS else get_close_matches(name, commands, n=1)
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


def _add_common(parser: argparse.ArgumentParser, refused: Container[str] = ()) -> None:
    """Add the common options; those that the command refuses are not shown in its help."""

    def add(name: str, metavar: str, text: str, **settings: Any) -> None:
        shown = argparse.SUPPRESS if name in refused else text
        group.add_argument(f"--{name}", metavar=metavar, help=shown, **settings)

    group = parser.add_argument_group("options of every command")
    add("store", "URL", "the URL of the store")
    add("config", "FILE", "the configuration file")
    add(
        "collections",
        "MODULE:NAME",
        "your own collections, instead of those that the store remembers: NAME in the Python module "
        "MODULE is a Collection, or a list of them; MODULE may be in the working directory",
    )
    add("timeout", "SECONDS", "fail after this number of seconds", type=_seconds)
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


def _integer(text: str, what: str = "an integer >= 0", minimum: int = 0) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) >= minimum):
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
    return int(text)


def _at_least_one(text: str) -> int:
    return _integer(text, "an integer >= 1", 1)


def _version(text: str) -> int:
    return _integer(text, "a version, an integer >= 0")


def _version_or_absent(text: str) -> int | str:
    return text if text == "absent" else _version(text)


def _argument(name: str, metavar: str, text: str, **settings: Any) -> Add:
    return lambda parser: parser.add_argument(name, metavar=metavar, help=text, **settings)


def _flag(name: str, text: str) -> Add:
    return lambda parser: parser.add_argument(name, action="store_true", help=text)


def _repeatable(name: str, metavar: str, text: str, **settings: Any) -> Add:
    return _argument(name, metavar, text, action="append", default=[], **settings)


def _mode(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing, not even a test write; report what the target would refuse",
    )
    group.add_argument("--resume", action="store_true", help="continue an interrupted migration")


class _Named(argparse.Action):
    """An option whose own name is kept with its value."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, (option, values))


def _aggregate(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    for option, text in (
        ("--by", "count each value of this field; one line of JSON for each"),
        ("--sum", "the sum of this field instead; values that are no numbers are left out"),
        ("--min", "the least value of this field instead; null if there is none"),
        ("--max", "the greatest value of this field instead; null if there is none"),
    ):
        group.add_argument(option, metavar="FIELD", help=text, dest="aggregate", action=_Named)


def _leave_out(
    what: str = "that is stored but not declared",
    otherwise: str = "If anything else undeclared is stored, the command fails and writes nothing",
) -> Add:
    return _repeatable(
        "--leave-out",
        "NAME",
        f"exclude a collection (jobs) or field (machines.owner) {what}; may be repeated. {otherwise}",
    )


_COLLECTION: Final = _argument(
    "collection", "COLLECTION", "templates, requests, machines, or one that a program declares"
)
_IDS: Final = _argument("ids", "ID", "one or more ids", nargs="+")
_FILTERS: Final = _argument(
    "filters", "FILTER", "a condition, see below; all must match", nargs="*", default=[]
)
_EXPECTED_VERSION: Final = _argument(
    "--expected-version", "N", "write only if the stored entity has version N", type=_version
)
_MERGE: Final = _argument(
    "--merge",
    "keep|replace|newest",
    "if an entity exists already and differs: keep the existing one, replace it, or store the one "
    "with the newest updated_at",
    choices=("keep", "replace", "newest"),
)

_PUT: Final = (
    _COLLECTION,
    _argument("source", "JSON | -", "the JSON itself, or - to read stdin", nargs="?"),
    _argument("--file", "FILE", "read the JSON from a file"),
    _flag("--create", "refuse entities that exist already"),
    _argument(
        "--expected-version",
        "N|absent",
        "write only if the stored entity has version N; absent: only if it does not exist",
        type=_version_or_absent,
    ),
)
_UPDATE: Final = (
    _COLLECTION,
    _argument("id", "ID", "the id of the entity"),
    _argument(
        "changes",
        "FIELD=VALUE | JSON",
        "the fields to set, or one JSON object with them",
        nargs="*",
        default=[],
    ),
    _repeatable("--remove", "FIELD", "remove a field; may be repeated"),
    _EXPECTED_VERSION,
)
_ORDER: Final = _repeatable(
    "--order",
    "NAME|-NAME",
    "sort by a field, ascending, or descending with -; separate several fields by commas",
)
_QUERY: Final = (
    _COLLECTION,
    _FILTERS,
    _ORDER,
    _argument("--limit", "N", "maximum number of entities", type=_integer),
    _repeatable("--fields", "A,B", "show only these fields, the key and the version"),
    _flag("--explain", "show the query plan instead of running the query"),
)
_FORMAT: Final = _argument(
    "--format", "csv|jsonl", "the format of the file", choices=("csv", "jsonl"), required=True
)
_EXPORT: Final = (
    _COLLECTION,
    _FILTERS,
    _FORMAT,
    _ORDER,
    _argument("--limit", "N", "maximum number of entities", type=_integer),
    _repeatable("--fields", "A,B", "write only these fields, the key and the version"),
    _argument("--output", "FILE", "write to this file instead of stdout"),
)


def _existing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    for option, constant, text in (
        ("--update", "update", "set the fields of the row in entities that exist; others are kept"),
        ("--replace", "replace", "replace entities that exist as a whole"),
        ("--skip-existing", "skip", "leave entities that exist as they are"),
    ):
        group.add_argument(option, dest="existing", action="store_const", const=constant, help=text)


_IMPORT: Final = (
    _COLLECTION,
    _argument("file", "FILE | -", "the file, or - to read stdin"),
    _FORMAT,
    _argument("--key", "NAME", "the column or field that holds the id (default: the key field)"),
    _existing,
    _flag("--keep-versions", "store the versions and timestamps of the file, as a restore does"),
    _flag("--dry-run", "write nothing; check each row, and whether its entity exists"),
    _argument(
        "--from-line",
        "N",
        "skip the rows that begin before this line of the file",
        type=_at_least_one,
        default=1,
    ),
)
_CHECKPOINT: Final = _argument(
    "--recover-from",
    "file|journal|salvage",
    "recover a store whose data file and journal do not match, or whose journal is damaged; see below",
    action=_Once,
    choices=("file", "journal", "salvage"),
)
_BACKUP: Final = (
    _argument(
        "destination",
        "DESTINATION",
        "a new file, or an existing folder or path ending in / for a file with a dated name "
        "(default: migration.backup_location of the configuration, which is backups/ if not set)",
        nargs="?",
    ),
    _argument(
        "--keep",
        "N",
        "delete all but the newest N dated backups (backup_TIME.jsonl.gz) in the folder, whichever "
        "store they are of",
        type=_at_least_one,
    ),
    _flag(
        "--allow-smaller",
        "with --keep: delete older backups even if they hold far more than the remaining ones",
    ),
    _flag("--copy", "copy the data files to a new file or folder instead (JSON stores)"),
    _leave_out(),
)
_RESTORE: Final = (
    _argument("source", "SOURCE", "a backup: a file, or a folder of files"),
    _MERGE,
    _leave_out(
        "that the backup contains but that is not declared",
        "If the backup contains anything else undeclared, the command fails and writes nothing",
    ),
)


def _pair(*, required: bool) -> tuple[Add, Add]:
    return (
        _argument("--from", "URL", "the source store", dest="source", required=required),
        _argument("--to", "URL", "the target store", dest="target", required=required),
    )


_MIGRATION: Final = (
    _argument("--batch-size", "N", "number of entities in a batch", type=_at_least_one),
    _argument("--workers", "N", "number of batches written at once", type=_at_least_one),
    _argument(
        "--backup-location",
        "PATH",
        "the backup file, or, ending in /, the folder for it; the progress file is stored there, too",
    ),
    _flag("--no-backup", "do not back up the source first"),
    _flag("--no-verify", "do not compare the stores afterwards"),
    _flag(
        "--cleanup-source",
        "empty the source after the verification, including entities that --merge keep or newest did "
        "not copy",
    ),
    _MERGE,
    _leave_out(),
    _mode,
)
_STORE_TYPES: Final = "json, sql, sqlite, postgresql or dynamodb"
_MIGRATE_REPOSITORY: Final = (
    _argument("--source-type", "TYPE", _STORE_TYPES, required=True),
    _argument("--target-type", "TYPE", _STORE_TYPES, required=True),
    _argument("--source-config", "FILE", "the configuration file of the source"),
    _argument("--target-config", "FILE", "the configuration file of the target"),
    *_MIGRATION,
)
_LIVE_MIGRATE: Final = (
    _argument(
        "action",
        "ACTION",
        "start, status, rollback, abort or finalize; see below",
        choices=("start", "status", "rollback", "abort", "finalize"),
    ),
    *_pair(required=True),
    _argument(
        "--rate",
        "N",
        "maximum number of entities copied per second (default: 5000)",
        type=_at_least_one,
        default=5000,
    ),
    _flag("--no-cut-over", "copy and verify, but do not switch; run `start` again to switch"),
)
_SCHEMA: Final = (
    _argument(
        "action", "ACTION", "plan, apply or check; see below", choices=("plan", "apply", "check")
    ),
    _flag("--complete", "apply: all programs with an older declaration have ended"),
    _argument(
        "--transform",
        "MODULE:NAME",
        "apply: a dict of functions by collection, which change the stored entities; see below",
    ),
    _repeatable("--allow", "KIND", "check: differences of this kind, such as values, are accepted"),
)
_CLAIMS: Final = (
    _argument("action", "ACTION", "list or break; see below", choices=("list", "break")),
    _argument(
        "collection", "COLLECTION", "the collection of the entities, or hf_locks: the named locks"
    ),
    _argument("ids", "ID", "break: the ids of the entities", nargs="*", default=[]),
)
_VERIFY: Final = (
    _argument("backup", "BACKUP", "a portable backup file, made by `backup`", nargs="?"),
    *_pair(required=False),
    _leave_out(),
)

EXTERNAL_COMMANDS: Final = dict.fromkeys(("bench", "advise", "demo"), "hf-async-store-bench")
"""Commands that another package of this project adds, and the name of that package."""

_CLI: Final = "hf_async_store.cli"
_GIVE_BOTH: Final = "give --from URL and --to URL"

COMMANDS: Final[Mapping[str, Command]] = {
    "init": Command(
        "init",
        "create an empty store, if none exists",
        f"{_CLI}.admin_commands:init",
        (),
        "An existing store is not changed, so the command may be repeated. The collections that\n"
        "--collections or the configuration names are recorded in the store, for later commands.\n\n"
        f"  {PROGRAM} --store json:data/request_database.json init\n",
    ),
    "put": Command(
        "put COLLECTION [JSON | -] [OPTIONS]",
        "insert entities, or replace existing ones",
        f"{_CLI}.entity_commands:put",
        _PUT,
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
        (_COLLECTION, _IDS),
        "If an entity does not exist, the exit code is 1; the others are shown.\n\n"
        f"  {PROGRAM} get machines m-1 m-2\n"
        f"  {PROGRAM} get machines -- -id-that-begins-with-a-dash\n",
    ),
    "update": Command(
        "update COLLECTION ID [FIELD=VALUE... | JSON] [OPTIONS]",
        "change single fields of an existing entity",
        f"{_CLI}.entity_commands:update",
        _UPDATE,
        "A value is read as the declared type of its field. If the field is of type json, or not\n"
        "declared, the value is read as JSON if it is valid JSON, otherwise as a string.\n"
        "FIELD:=JSON sets any JSON value, and FIELD/NAME=VALUE a value inside a field.\n\n"
        f"  {PROGRAM} update requests req-1 status=COMPLETED completed_at=2025-06-30T12:00:00Z\n"
        f'  {PROGRAM} update requests req-1 \'tags:={{"owner": "ops"}}\' --remove note\n'
        f"  {PROGRAM} update requests req-1 tags/owner=ops --remove tags/temporary\n"
        f'  {PROGRAM} update requests req-1 \'{{"status": "FAILED"}}\' --expected-version 3\n',
    ),
    "delete": Command(
        "delete COLLECTION ID... [OPTIONS]",
        "delete entities",
        f"{_CLI}.entity_commands:delete",
        (_COLLECTION, _IDS, _EXPECTED_VERSION),
        "If an entity does not exist, the exit code is 1; the others are deleted.\n\n"
        f"  {PROGRAM} delete machines m-1 m-2\n"
        f"  {PROGRAM} delete machines m-1 --expected-version 3\n",
    ),
    "query": Command(
        "query COLLECTION [FILTER...] [OPTIONS]",
        "show the entities that match all filters",
        f"{_CLI}.entity_commands:query",
        _QUERY,
        f"{_FILTER_HELP}\n"
        f"  {PROGRAM} query machines request_id=req-1 status:ne=TERMINATED\n"
        f"  {PROGRAM} query requests status:in=PENDING,RUNNING --order -created_at --limit 20\n"
        f"  {PROGRAM} query machines status=RUNNING --fields private_ip,name --json\n",
    ),
    "count": Command(
        "count COLLECTION [FILTER...] [OPTIONS]",
        "count the entities that match all filters, or add up one of their fields",
        f"{_CLI}.entity_commands:count",
        (_COLLECTION, _FILTERS, _aggregate),
        f"{_FILTER_HELP}\n  {PROGRAM} count machines status=RUNNING\n"
        f"  {PROGRAM} count machines --by status\n"
        f"  {PROGRAM} count requests status=COMPLETED --sum machine_count\n",
    ),
    "watch": Command(
        "watch COLLECTION [FILTER...] [OPTIONS]",
        "write the changes of a collection as they are committed, as JSON lines",
        f"{_CLI}.feed_commands:watch",
        (
            _COLLECTION,
            _FILTERS,
            _argument("--since", "TOKEN", "go on after the change with this token"),
            _argument("--limit", "N", "end after this number of changes", type=_integer),
        ),
        "The collection must be declared with a feed. A change is written if the entity matched all\n"
        "filters before or after it: kind (put or delete), id, version, entity (null after a delete)\n"
        "and token. Without --since, it begins with what is committed from now on; the first line on\n"
        "stderr has the token for that. It ends with Ctrl-C, or after --limit.\n\n"
        f"{_FILTER_HELP}\n"
        f"  {PROGRAM} watch machines request_id=req-1\n"
        f'  {PROGRAM} watch machines --since "$TOKEN" --limit 1\n',
    ),
    "wait": Command(
        "wait COLLECTION ID [FILTER...]",
        "wait until an entity matches all filters, and show it",
        f"{_CLI}.feed_commands:wait",
        (_COLLECTION, _argument("id", "ID", "the id of the entity"), _FILTERS),
        "The collection needs no feed. The exit code is 1 if the entity does not exist or is deleted\n"
        f"meanwhile, and 5 if it does not match within --timeout.\n\n{_FILTER_HELP}\n"
        f"  {PROGRAM} wait requests req-1 status:in=COMPLETED,FAILED --timeout 60\n",
    ),
    "update-where": Command(
        "update-where COLLECTION FILTER... --set FIELD=VALUE [OPTIONS]",
        "change fields of the entities that match all filters",
        f"{_CLI}.entity_commands:update_where",
        (
            _COLLECTION,
            _argument("filters", "FILTER", "a condition, see below; all must match", nargs="+"),
            _repeatable(
                "--set",
                "FIELD=VALUE",
                "set a field, as in `update`; may be repeated",
                dest="changes",
            ),
            _repeatable("--remove", "FIELD", "remove a field; may be repeated"),
            _ORDER,
            _argument("--limit", "N", "change at most this number, in this order", type=_integer),
        ),
        "An entity that is changed meanwhile is changed only if it still matches. The number of\n"
        f"changed entities is shown.\n\n{_FILTER_HELP}\n"
        f"  {PROGRAM} update-where machines request_id=req-1 --set status=TERMINATED\n"
        f"  {PROGRAM} update-where machines status=PENDING --set tags/owner=ops --limit 100\n",
    ),
    "delete-where": Command(
        "delete-where COLLECTION FILTER... [OPTIONS]",
        "delete the entities that match all filters",
        f"{_CLI}.entity_commands:delete_where",
        (
            _COLLECTION,
            _argument("filters", "FILTER", "a condition, see below; all must match", nargs="+"),
            _ORDER,
            _argument("--limit", "N", "delete at most this number, in this order", type=_integer),
        ),
        "An entity that is changed meanwhile is deleted only if it still matches. The number of\n"
        f"deleted entities is shown.\n\n{_FILTER_HELP}\n"
        f"  {PROGRAM} delete-where requests status=COMPLETED completed_at:lt=2025-01-01\n"
        f"  {PROGRAM} delete-where machines status=TERMINATED --order updated_at --limit 1000\n",
    ),
    "export": Command(
        "export COLLECTION [FILTER...] --format csv|jsonl [OPTIONS]",
        "write the entities that match all filters to a file, or to stdout",
        f"{_CLI}.transfer_commands:export",
        _EXPORT,
        "A file of JSON lines holds an entity in each line. A CSV file has a column for the key, for each\n"
        "declared field and for the version, and the column *: a JSON object of all other fields. An\n"
        "empty cell is a field that the entity does not have. Text and timestamps are written as they\n"
        'are, unless they are empty, null or begin with "; everything else is written as JSON. So\n'
        "`import` reads equal entities. A file gets its name when it is complete. To copy a store as a\n"
        f"whole, use `backup`.\n\n{_FILTER_HELP}\n"
        f"  {PROGRAM} export machines --format csv --output machines.csv\n"
        f"  {PROGRAM} export machines status=RUNNING --format jsonl --fields name | gzip > m.gz\n",
    ),
    "import": Command(
        "import COLLECTION FILE --format csv|jsonl [OPTIONS]",
        "create entities from a file of `export`, or of another program",
        f"{_CLI}.transfer_commands:import_",
        _IMPORT,
        "The file may have any size: it is read and written in batches of 1,000 rows. `export --help`\n"
        "describes the format; the first line of a CSV file names the columns. Names that are not\n"
        "declared become fields, too; their cells are text if they are not JSON.\n\n"
        "A row that is not valid, or whose entity exists, is refused and reported with its line; the\n"
        "others are imported. A quote that is not closed ends the import of a CSV file. The versions of\n"
        "the file are ignored, unless --keep-versions is given. --dry-run does not check references.\n\n"
        "If the store fails, the import ends, and rows that were not written are not counted as refused.\n"
        "Ctrl-C ends it after the batch that is being written, a second Ctrl-C at once. The command then\n"
        "says how to go on.\n\n"
        f"  {PROGRAM} import machines machines.csv --format csv --dry-run\n"
        f"  {PROGRAM} import machines hosts.csv --format csv --key hostname --update\n"
        f"  {PROGRAM} export machines --format jsonl | \\\n"
        f"      {PROGRAM} import machines - --format jsonl --keep-versions --store json:copy.json\n",
    ),
    "purge": Command(
        "purge [COLLECTION] [OPTIONS]",
        "remove expired entities",
        f"{_CLI}.admin_commands:purge",
        (
            _argument("collection", "COLLECTION", "only this collection", nargs="?"),
            _argument("--limit", "N", "remove at most this number", type=_integer),
        ),
        "Expired entities are absent for every command and method; this frees their space. It works in\n"
        "small batches, while other programs read and write. An entity to which others refer stays until\n"
        "the last of them is removed. The number of removed entities is shown.\n\n"
        f"  {PROGRAM} purge\n"
        f"  {PROGRAM} purge requests --limit 10000\n",
    ),
    "health": Command(
        "health",
        "check that the store works: writing, reading, free space, files",
        f"{_CLI}.admin_commands:health",
        (),
        "If there is a problem, the exit code is 4, and each problem is reported on stderr.\n",
    ),
    "describe": Command(
        "describe",
        "show collections, capabilities and configuration",
        f"{_CLI}.admin_commands:describe",
        (),
        "Passwords are not shown. For DynamoDB stores, the existing tables are shown, too; each\n"
        "difference between them and the declarations is reported on stderr.\n",
    ),
    "create-tables": Command(
        "create-tables",
        "create missing tables and indexes (DynamoDB stores)",
        f"{_CLI}.admin_commands:create_tables",
        (),
        "Waits until the tables and indexes are active, and sets auto scaling and point-in-time\n"
        "recovery as configured. Missing tables are also created by the first write. Missing\n"
        "indexes of existing tables are created only by this command, because that may take long.\n",
    ),
    "schema": Command(
        "schema ACTION [OPTIONS]",
        "compare the store with the declared collections, and bring it to them",
        f"{_CLI}.schema_command:schema",
        _SCHEMA,
        "  plan   show what differs, and what `apply` does about it; nothing is changed\n"
        "  apply  do it, while other programs read and write; say on stderr what was applied, then\n"
        "         show what remains\n"
        "  check  as plan; if anything differs, the exit code is 3\n\n"
        "Queries are right without `apply`, and may be slower. It may be interrupted and run again. If\n"
        "required values are missing, nothing is changed, and the first entities are named. Values that\n"
        "do not fit their type stay as they are.\n\n"
        "With --transform, each function is called with each entity of its collection, and returns the\n"
        "fields to change or None. It runs before the rest, so that it can provide required values. For\n"
        "an entity that it has transformed it must return nothing new.\n\n"
        "With --complete you state that all programs with an older declaration have ended: DynamoDB\n"
        "queries use new indexes only then. Name the collections by --collections,\n"
        "HF_ASYNC_STORE_COLLECTIONS, or storage.collections of the configuration.\n\n"
        f"  {PROGRAM} schema plan --collections shop.collections:ALL\n"
        f"  {PROGRAM} schema apply --collections shop.collections:ALL --transform shop.changes:ALL\n"
        f"  {PROGRAM} schema check --collections shop.collections:ALL --allow values\n",
    ),
    "claims": Command(
        "claims ACTION COLLECTION [ID...]",
        "show which entities are claimed, and end claims",
        f"{_CLI}.claims_command:claims",
        _CLAIMS,
        "  list   show the claims, and the entities that were claimed before without being finished\n"
        "  break  end the claims of these entities, whoever holds them; their holders are refused\n"
        "         from then on. If an entity has no claim, the exit code is 1\n\n"
        f"  {PROGRAM} claims list requests\n"
        f"  {PROGRAM} claims break requests req-1\n",
    ),
    "shell": Command(
        "shell [OPTIONS]",
        "an interactive Python prompt with the store opened",
        f"{_CLI}.shell_command:shell",
        (_flag("--read-only", "`store` has no methods that write, as a protection from mistakes"),),
        "`store` is the opened store, and all names of hf_async_store are imported. Statements may\n"
        "contain `await`. Ctrl-C ends the statement, Ctrl-D the shell. The history is kept in\n"
        "$XDG_STATE_HOME/hf-async-store/shell_history (~/.local/state). If stdin is not a terminal, it is\n"
        "read to its end as one Python file, whose statements are run until one fails. If it is not valid\n"
        "Python, nothing is run. A statement without `await` runs outside of the event loop. --timeout is\n"
        "not used.\n\n"
        f"  {PROGRAM} shell\n"
        f"  {PROGRAM} shell --read-only <<< 'await store.count_entities(\"machines\")'\n",
    ),
    "top": Command(
        "top [OPTIONS]",
        "watch what happens in the store: entities, changes, claims, sizes, problems",
        f"{_CLI}.top_command:top",
        (
            _argument(
                "--interval",
                "SECONDS",
                "time between two looks (default: 2; 60 if counting reads all entities, as on DynamoDB)",
                type=_seconds,
            ),
            _flag("--once", "look for one interval, show what was seen, and end"),
        ),
        "For each collection: the number of entities, by how much it changes, the changes per second if\n"
        "it has a feed, and the claims that are held, with the one that this command has seen for the\n"
        "longest time. Besides: named locks, sizes, connections, and what `health` reports, every 30\n"
        "seconds. `slow here` are queries of this command itself: programs report their own by\n"
        "`health()`. q or Ctrl-C ends it. If stdout is not a terminal, or with --json, each look is a\n"
        "line of JSON. A look that fails is shown, as a line with `error`, and the next one follows.\n"
        "--timeout is that of one look. With --once, the exit code is 4 if there is a problem.\n\n"
        f"  {PROGRAM} top\n"
        f"  {PROGRAM} top --once --json --interval 10\n",
    ),
    "completion": Command(
        "completion bash|zsh|fish",
        "print a script by which a shell completes command lines",
        f"{_CLI}.completion_command:completion",
        (
            _argument(
                "action",
                "SHELL",
                "bash, zsh or fish; or `words`, which the scripts use",
                choices=("bash", "zsh", "fish", "words"),
            ),
            _argument(
                "words",
                "WORD",
                "words: those typed so far, the last of which may be empty",
                nargs="*",
                default=[],
            ),
        ),
        "Commands, options, their choices and collections are completed. Collections are those that the\n"
        "configuration names, or that a JSON or SQLite store remembers: no server is asked.\n\n"
        f"  bash: add to ~/.bashrc              source <({PROGRAM} completion bash)\n"
        f"  zsh:  add to ~/.zshrc, after compinit  source <({PROGRAM} completion zsh)\n"
        f"  fish: {PROGRAM} completion fish > ~/.config/fish/completions/{PROGRAM}.fish\n",
    ),
    "checkpoint": Command(
        "checkpoint [OPTIONS]",
        "write all commits from the journal to the data files (JSON stores)",
        f"{_CLI}.admin_commands:checkpoint",
        (_CHECKPOINT,),
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
        _BACKUP,
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
        _RESTORE,
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
        (),
        f"The newest is listed first. `{PROGRAM} restore` restores any of them.\n",
    ),
    "migrate": Command(
        "migrate --from URL --to URL [OPTIONS]",
        "copy everything to another store, and verify that both are equal",
        f"{_CLI}.migrate_commands:migrate",
        (*_pair(required=True), *_MIGRATION),
        "No other program may write to either store meanwhile. First the source is backed up, then\n"
        "it is copied in batches, then both stores are compared. Whatever error occurs until then,\n"
        "the source is unchanged. The `migration` block is read from --config FILE, or else from the\n"
        "configuration of the source; options on the command line take precedence.\n\n"
        f"  {PROGRAM} migrate --from json:data --to json:data.json --dry-run\n"
        f"  {PROGRAM} migrate --from json:data --to json:data.json\n"
        f"  {PROGRAM} migrate --from json:data --to json:data.json --resume\n",
        {"store": _GIVE_BOTH},
    ),
    "migrateRepository": Command(
        "migrateRepository --source-type TYPE --target-type TYPE [OPTIONS]",
        "like migrate, with store types and configuration files instead of URLs",
        f"{_CLI}.migrate_commands:migrate_repository",
        _MIGRATE_REPOSITORY,
        f"The file given with --config (or {STORE_VARIABLE}) has a block for each of the two types. If\n"
        "both stores are of the same type, give --source-config and --target-config.\n\n"
        f"  {PROGRAM} migrateRepository --source-type json --target-type sql --batch-size 100 \\\n"
        "      --config config.json\n",
        {"store": "give --source-type, --target-type and --config"},
    ),
    "live-migrate": Command(
        "live-migrate ACTION --from URL --to URL [OPTIONS]",
        "migrate to another store while applications use it",
        f"{_CLI}.live_migrate_command:live_migrate",
        _LIVE_MIGRATE,
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
        {"store": _GIVE_BOTH, "config": _GIVE_BOTH},
    ),
    "verify": Command(
        "verify --from URL --to URL | verify BACKUP",
        "compare two stores, or verify a backup file",
        f"{_CLI}.migrate_commands:verify",
        _VERIFY,
        "If the stores differ, the exit code is 3, and the first differences are reported by id and\n"
        "field. A store is not compared with itself: so not during a live migration, in which both\n"
        "follow to the active store.\n\n"
        f"  {PROGRAM} verify --from json:data --to json:data.json\n"
        f"  {PROGRAM} verify backups/backup_20250630T120000Z.jsonl.gz\n",
        dict.fromkeys(("store", "config"), f"{_GIVE_BOTH}, or a backup file"),
    ),
}
