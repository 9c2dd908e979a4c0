"""Completion of command lines: the scripts for shells, and the words that can come next."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from hf_async_store.cli import output
from hf_async_store.cli.arguments import (
    COMMANDS,
    EXTERNAL_COMMANDS,
    command_of,
    parser_of,
    top_parser,
)
from hf_async_store.cli.context import config_of, declared_schema
from hf_async_store.cli.declared import named_collections
from hf_async_store.cli.extensions import names
from hf_async_store.config import JSONConfig, SQLConfig
from hf_async_store.errors import InvalidInputError, StorageError
from hf_async_store.schema import HOST_FACTORY, Collection

if TYPE_CHECKING:
    from hf_async_store.config import StorageConfig

_SECONDS: Final = 2.0
"""How long a store on this machine may take to tell its collections."""

_SCRIPTS: Final = {
    "bash": """\
_hf_async_store() {
    local -a words
    read -ra words <<< "${COMP_LINE:0:COMP_POINT}"
    [[ ${COMP_LINE:COMP_POINT-1:1} == ' ' ]] && words+=('')
    local IFS=$'\\n'
    COMPREPLY=($("${words[0]}" completion words -- "${words[@]:1}" 2>/dev/null))
}
complete -o default -F _hf_async_store hf-async-store
""",
    "zsh": """\
#compdef hf-async-store
_hf_async_store() {
    local -a found
    found=(${(f)"$(${words[1]} completion words -- "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    if (( $#found )); then compadd -- $found; else _files; fi
}
if [[ $funcstack[1] == _hf_async_store ]]; then
    _hf_async_store "$@"
else
    compdef _hf_async_store hf-async-store
fi
""",
    "fish": """\
function __hf_async_store
    set -l words (commandline -opc) (commandline -ct)
    $words[1] completion words -- $words[2..-1] 2>/dev/null
end
complete -c hf-async-store -a '(__hf_async_store)'
""",
}


def completion(arguments: argparse.Namespace) -> int:
    if arguments.action == "words":
        for each in candidates(arguments.words or [""]):
            output.line(each)
        return 0
    if arguments.words:
        raise InvalidInputError(f"`completion {arguments.action}` takes no words")
    output.write(_SCRIPTS[arguments.action].encode())
    return 0


def candidates(words: Sequence[str]) -> list[str]:
    """What the last one of the words, those after the name of the program, can become."""
    *before, current = words
    parser = top_parser()
    given = _Given.of(parser, before)
    command = command_of(given.positional[0]) if given.positional else None
    if command is None:
        found = [] if given.positional else [*COMMANDS, *EXTERNAL_COMMANDS, *names()]
    else:
        name = given.positional[0]
        parser = parser_of(name, command)
        given = _Given.of(parser, before)
        found = _next_positional(parser, given)
    if given.pending is not None:
        found = list(given.pending.choices or ())
    elif current.startswith("-"):
        found = [
            option
            for option, action in parser._option_string_actions.items()
            if action.help != argparse.SUPPRESS
        ]
    return sorted({each for each in found if each.startswith(current)})


class _Given(NamedTuple):
    """The words that are complete.

    Attributes:
        values: of the options that take one, by the names of their arguments.
        pending: the option that waits for its value.
    """

    positional: list[str]
    values: dict[str, str]
    pending: argparse.Action | None

    @classmethod
    def of(cls, parser: argparse.ArgumentParser, words: Iterable[str]) -> _Given:
        positional: list[str] = []
        values: dict[str, str] = {}
        pending: argparse.Action | None = None
        for word in words:
            name, equals, value = word.partition("=")
            action = parser._option_string_actions.get(name)
            if pending is not None:
                values[pending.dest] = word
                pending = None
            elif not word.startswith("-") or word == "-":
                positional.append(word)
            elif action is not None and equals:
                values[action.dest] = value
            elif action is not None and action.nargs is None:
                pending = action
        return cls(positional, values, pending)


def _next_positional(parser: argparse.ArgumentParser, given: _Given) -> list[str]:
    actions = parser._get_positional_actions()
    index = len(given.positional) - 1  # the first one is the command
    if index >= len(actions):
        return []
    if actions[index].dest == "collection":
        return _collections(given.values)
    return list(actions[index].choices or ())


def _collections(values: Mapping[str, str]) -> list[str]:
    """The names of the collections of the store that the words name, or of the spec."""
    arguments = argparse.Namespace(timeout=_SECONDS, verbose=False)
    for name in ("store", "config", "collections"):
        setattr(arguments, name, values.get(name))
    try:
        config = config_of(arguments)
        found: Iterable[Collection] | None = named_collections(arguments, [config])
        if found is None and _is_local(config):
            found = declared_schema(arguments, config).values()
    except StorageError:
        found = None
    return [each.name for each in found or HOST_FACTORY]


def _is_local(config: StorageConfig) -> bool:
    """Whether the store can be read without a network."""
    options = config.options
    return isinstance(options, JSONConfig) or (
        isinstance(options, SQLConfig) and options.type == "sqlite"
    )
