"""HTTP without a framework: problem documents, entity tags, links between pages."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import pytest

import hf_async_store
from hf_async_store import (
    ABSENT,
    AlreadyExistsError,
    BatchError,
    Collection,
    ConcurrencyConflictError,
    CorruptionError,
    EntityNotFoundError,
    Field,
    Index,
    InvalidInputError,
    InvalidQueryError,
    LockTimeoutError,
    Page,
    PartialChangeError,
    StorageError,
    StorageStrategy,
    TransactionAbortedError,
    UnavailableError,
    UniqueViolationError,
    open_store,
)
from hf_async_store.driver import ANY
from hf_async_store.integrations.http import (
    PreconditionFailedError,
    check_preconditions,
    entity_tag,
    expected_version,
    is_match,
    is_none_match,
    page_headers,
    problem_of,
    status_of,
)

ENTITY = {"id": "a", "version": 3, "created_at": "2026-01-01T00:00:00.000000Z"}
TAG = entity_tag(ENTITY)  # type: ignore[arg-type]
CONFLICT = ConcurrencyConflictError(
    "stale", collection="requests", entity_id="a", expected=3, actual=4
)


# -- errors ---------------------------------------------------------------------------------

STATUSES = {
    "AlreadyExistsError": 409,
    "ClaimLostError": 409,
    "ConcurrencyConflictError": 409,
    "DiskFullError": 503,
    "EntityNotFoundError": 404,
    "FeedExpiredError": 410,
    "InvalidCursorError": 422,
    "InvalidFieldError": 422,
    "InvalidInputError": 422,
    "InvalidKeyError": 422,
    "InvalidQueryError": 422,
    "InvalidVersionError": 422,
    "LockTimeoutError": 503,
    "OperationTimeoutError": 503,
    "PoolTimeoutError": 503,
    "ReadOnlyStoreError": 503,
    "ReferenceViolationError": 409,
    "RetriesExhaustedError": 409,
    "StoreClosedError": 503,
    "SubscriptionAdvancedError": 409,
    "ThrottledError": 503,
    "TransactionTooLargeError": 413,
    "UnavailableError": 503,
    "UniqueViolationError": 409,
    "UnknownCollectionError": 422,
    "UnsupportedValueError": 422,
}
"""All others are 500."""

PAGE = Path(__file__).parents[2] / "docs/web.md"

WITHOUT_A_STATUS = {"BatchError", "PartialChangeError", "TransactionAbortedError"}
"""Their status is that of their cause."""

ERRORS = [
    each
    for each in hf_async_store.__all__
    if each.endswith("Error") and each not in WITHOUT_A_STATUS
]


@pytest.mark.parametrize("name", ERRORS)
def test_the_status_of_every_error(name: str) -> None:
    kind = getattr(hf_async_store, name)
    error = kind.__new__(kind, "the host db.internal")
    error.__dict__.update(retryable=False, outcome_unknown=False)
    error.collection = error.entity_id = error.expected = None
    error.fields, error.owner_id = (), "somebody"
    problem = problem_of(error, {})
    assert problem.status == STATUSES.get(name, 500)
    assert problem.document["status"] == problem.status
    assert ("detail" in problem.document) is (problem.status < 500)
    assert "somebody" not in str(problem)
    assert "Retry-After" not in problem.headers


def test_the_table_of_the_page() -> None:
    rows = re.findall(r"^\| (\d{3}) \| (.*?) \|", PAGE.read_text("utf-8"), re.MULTILINE)
    listed = {
        (name, int(status)) for status, text in rows for name in re.findall(r"`(\w+Error)`", text)
    }
    assert listed >= {(name, status) for name, status in STATUSES.items() if is_listed(name)}
    conditional = {"PreconditionFailedError", "ConcurrencyConflictError", "AlreadyExistsError"}
    for name, status in listed - {(each, 412) for each in conditional}:
        assert STATUSES.get(name, 500) == status, name


def is_listed(name: str) -> bool:
    """Whether an error is not only a subclass of one that the table lists."""
    return not any(
        name != other and issubclass(getattr(hf_async_store, name), getattr(hf_async_store, other))
        for other in STATUSES
    )


def test_what_may_be_repeated_says_when() -> None:
    assert problem_of(LockTimeoutError("x")).headers["Retry-After"] == "1"
    assert problem_of(UnavailableError("x")).headers["Retry-After"] == "1"
    lost = problem_of(UnavailableError("x", retryable=False, outcome_unknown=True))
    assert lost.status == 503
    assert "Retry-After" not in lost.headers
    assert lost.document["outcome_unknown"] is True


def test_the_entity_is_named_and_another_one_is_not() -> None:
    document = problem_of(UniqueViolationError("users", "u-1", ["email"], "u-2")).document
    assert document == {
        "title": "Conflict",
        "status": 409,
        "detail": "another entity of users has the same email",
        "error": "UniqueViolationError",
        "collection": "users",
        "id": "u-1",
        "fields": ("email",),
        "retryable": False,
        "outcome_unknown": False,
    }


async def test_another_entity_is_not_named_by_an_error_that_quotes_one_about_it() -> None:
    users = Collection(
        "users", key="id", fields=[Field("n", "integer")], indexes=[Index("n", unique=True)]
    )
    new = [{"id": "u-1", "n": 1}, {"id": "u-2", "n": 1}]
    errors: list[StorageError] = []

    async def in_a_transaction(store: StorageStrategy) -> None:
        async with store.begin_transaction() as tx:
            with suppress(UniqueViolationError):
                await tx.create_entities("users", new)

    async with open_store("memory:", collections=[users]) as store:
        await store.create_entity("users", {"id": "secret", "n": 1})
        with pytest.raises(BatchError) as batch:
            await store.create_entities("users", new)
        errors.append(batch.value)
        with pytest.raises(TransactionAbortedError) as aborted:
            await in_a_transaction(store)
        errors.append(aborted.value)
        await store.save_entity("users", {"id": "u-1", "n": 2})
        with pytest.raises(PartialChangeError) as partial:
            await store.update_where("users", {"n": 2}, {"n": 1})
        errors.append(partial.value)
    for each in errors:
        assert "'secret'" in str(each)
        document = problem_of(each).document
        assert "secret" not in repr(document)
        assert "another entity of users has the same n" in document["detail"]


def test_a_conflict_is_412_if_the_client_sent_the_version() -> None:
    assert status_of(CONFLICT, {}) == 409
    assert status_of(CONFLICT, {"if-match": TAG}) == 412
    assert status_of(CONFLICT, {"if-match": TAG.replace("3-", "2-")}) == 409
    retryable = ConcurrencyConflictError("serialization", retryable=True)
    assert status_of(retryable, {"if-match": TAG}) == 409
    exists = AlreadyExistsError("requests", "a")
    assert status_of(exists, {}) == 409
    assert status_of(exists, {"if-none-match": "*"}) == 412
    assert status_of(EntityNotFoundError("requests", "a"), {"if-match": TAG}) == 404


def test_errors_with_a_cause() -> None:
    aborted = TransactionAbortedError("x")
    assert status_of(aborted) == 500
    aborted.__cause__ = AlreadyExistsError("requests", "a")
    assert status_of(aborted) == 409
    partial = problem_of(PartialChangeError(5, LockTimeoutError("x")))
    assert (partial.status, partial.document["done"]) == (503, 5)
    assert "Retry-After" not in partial.headers, "the first five would be changed again"
    batch = problem_of(BatchError("x", [1, InvalidQueryError("x"), LockTimeoutError("x")]))
    assert batch.status == 503
    assert "Retry-After" not in batch.headers
    first, second, third = batch.document["outcomes"]
    assert (first, second["status"], third["status"]) == (None, 422, 503)


def test_what_an_error_says_of_the_server_is_not_shown() -> None:
    damaged = CorruptionError("file requests.json, offset 5")
    assert problem_of(damaged).document == {
        "title": "Internal Server Error",
        "status": 500,
        "retryable": False,
        "outcome_unknown": False,
    }


# -- entity tags ----------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"created_at": "2026-01-01T00:00:00Z"}])
async def test_a_tag_is_another_one_after_every_change(
    hf_store: StorageStrategy, given: dict[str, str]
) -> None:
    seen = []
    for _ in range(2):
        await hf_store.create_entity("templates", {"template_id": "t", **given})
        for name in ("x", "y"):
            await hf_store.update_entity("templates", "t", {"name": name})
            entity = await hf_store.get_entity("templates", "t")
            assert entity is not None
            assert expected_version({"if-match": entity_tag(entity)}) == entity["version"]
            seen.append(entity_tag(entity))
        await hf_store.delete_entity("templates", "t")
    assert len(set(seen)) == 4


def test_the_expected_version_of_a_request() -> None:
    assert expected_version({}) is ANY
    assert expected_version({"if-match": f" {TAG} "}) == 3
    assert expected_version({"if-none-match": "*"}) is ABSENT


@pytest.mark.parametrize(
    ("headers", "error"),
    [
        ({"if-match": f"W/{TAG}"}, PreconditionFailedError),
        ({"if-match": '"of-another-program"'}, PreconditionFailedError),
        ({"if-match": TAG.replace("3", "9" * 30)}, PreconditionFailedError),
        ({"if-match": TAG, "if-none-match": "*"}, PreconditionFailedError),
        ({"if-match": "3"}, InvalidInputError),
        ({"if-match": ""}, InvalidInputError),
        ({"if-match": "*"}, InvalidInputError),
        ({"if-match": f"{TAG}, {TAG}"}, InvalidInputError),
        ({"if-match": f"{TAG} x"}, InvalidInputError),
        ({"if-none-match": TAG}, InvalidInputError),
    ],
)
def test_preconditions_that_are_refused(headers: dict[str, str], error: type[StorageError]) -> None:
    with pytest.raises(error) as caught:
        expected_version(headers)
    assert status_of(caught.value) == (412 if error is PreconditionFailedError else 422)


def test_a_header_of_many_tags_is_read_in_one_pass() -> None:
    with pytest.raises(InvalidInputError):
        expected_version({"if-match": '"",' * 20_000 + "x"})
    with pytest.raises(InvalidInputError):
        expected_version({"if-match": " ," * 20_000 + "x"})


def test_preconditions_on_an_entity() -> None:
    entity: hf_async_store.Entity = dict(ENTITY)  # type: ignore[arg-type]
    fulfilled: list[tuple[dict[str, str], hf_async_store.Entity | None]] = [
        ({}, entity),
        ({}, None),
        ({"if-match": f'"x", {TAG}'}, entity),
        ({"if-match": "*"}, entity),
        ({"if-none-match": "*"}, None),
        ({"if-none-match": '"x"'}, entity),
    ]
    for headers, found in fulfilled:
        check_preconditions(headers, found)
    failed: list[tuple[dict[str, str], hf_async_store.Entity | None]] = [
        ({"if-match": '"x"'}, entity),
        ({"if-match": f"W/{TAG}"}, entity),
        ({"if-match": TAG}, {**entity, "created_at": "2027-01-01T00:00:00.000000Z"}),
        ({"if-match": "*"}, None),
        ({"if-none-match": "*"}, entity),
        ({"if-none-match": f"W/{TAG}"}, entity),
    ]
    for headers, found in failed:
        with pytest.raises(PreconditionFailedError):
            check_preconditions(headers, found)
    assert is_none_match({"if-none-match": f'"x",W/{TAG}'}, entity)
    assert not is_match({"if-match": f"W/{TAG}"}, entity)


@pytest.mark.parametrize("value", ["*", f"{TAG}, {TAG}"])
def test_what_an_endpoint_can_do_for_more_than_one_tag(value: str) -> None:
    with pytest.raises(InvalidInputError, match=r"\* or several tags.*check_preconditions in a tr"):
        expected_version({"if-match": value})


@pytest.mark.parametrize("header", ["if-match", "if-none-match"])
@pytest.mark.parametrize("value", ["3", f"x{TAG}", f"{TAG} x", f"{TAG} {TAG}", ""])
def test_malformed_preconditions_are_refused(header: str, value: str) -> None:
    with pytest.raises(InvalidInputError):
        check_preconditions({header: value}, ENTITY)  # type: ignore[arg-type]


def test_empty_elements_of_a_list_are_ignored() -> None:
    for value in (f", {TAG}", f" ,, {TAG},", f'"other",,{TAG}'):
        check_preconditions({"if-match": value}, ENTITY)  # type: ignore[arg-type]
    assert expected_version({"if-match": f", {TAG} ,"}) == 3


# -- pages ----------------------------------------------------------------------------------


def test_the_link_to_the_next_page() -> None:
    asked = [("status", "a&b"), ("cursor", "old"), ("limit", "2")]
    assert page_headers(Page([], None), asked) == {}
    assert page_headers(Page([], "new="), asked) == {
        "Link": '<?status=a%26b&limit=2&cursor=new%3D>; rel="next"'
    }
