"""Which values can be stored does not depend on the values that were copied before."""

from __future__ import annotations

from enum import StrEnum

import pytest

from hf_async_store import UnsupportedValueError
from hf_async_store.values import copy_entity, normalise


class Name(StrEnum):
    OWNER = "owner"


def test_a_key_of_a_subclass_of_str_is_refused_although_its_name_is_cached() -> None:
    assert copy_entity({"owner": 1}) == {"owner": 1}
    with pytest.raises(UnsupportedValueError, match="a dict key of type Name, not str"):
        copy_entity({Name.OWNER: 1})
    with pytest.raises(UnsupportedValueError, match="a dict key of type Name, not str"):
        normalise([{Name.OWNER: 1}])
    assert copy_entity({"owner": Name.OWNER}) == {"owner": "owner"}
