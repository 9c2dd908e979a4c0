"""The version of the driver interface, and the check that an engine was written for it."""

from __future__ import annotations

from typing import Final

from hf_async_store.errors import ConfigurationError

INTERFACE_VERSION: Final = 2
"""The version of the driver interface.

It grows when an engine that was right may now be wrong: a method or a name is removed, a required method
is added, or a method, its arguments or a capability have another meaning. It does not grow for a method
with a default, or a capability that is absent by default.
"""


def check_interface_version(engine: type, name: str) -> None:
    """Refuse an engine that was written for another version of the driver interface.

    Args:
        engine: its class.
        name: its name, for the error.
    """
    version = getattr(engine, "interface_version", None)
    if version == INTERFACE_VERSION:
        return
    described = f"the engine {name!r} ({engine.__module__}.{engine.__qualname__})"
    if not isinstance(version, int):
        raise ConfigurationError(
            f"{described} does not state for which version of the driver interface it was written; its "
            f"author sets interface_version = {INTERFACE_VERSION} in the class, if it fulfils the contract"
        )
    newer = "hf_async_store" if version > INTERFACE_VERSION else _distribution(engine)
    raise ConfigurationError(
        f"{described} was written for version {version} of the driver interface, and this hf_async_store "
        f"has version {INTERFACE_VERSION}: install a newer release of {newer}"
    )


def _distribution(engine: type) -> str:
    """The name under which the package of an engine is installed."""
    from importlib.metadata import packages_distributions

    package = engine.__module__.partition(".")[0]
    return ", ".join(sorted(set(packages_distributions().get(package, [package]))))
