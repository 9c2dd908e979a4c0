"""The verification of the demo, on constructed logs and stores: accepted and reported deviations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from hf_async_store import EntityChange
from hf_async_store.schema import HOST_FACTORY, Schema
from hf_async_store_bench.demo.verify import Verifier
from hf_async_store_bench.demo.write_log import Answer, Hold, ProcessLog, Write, WriteLog

if TYPE_CHECKING:
    from pathlib import Path

P = "demo-1-"
REQUEST = f"{P}request-0-0000"
MACHINES = [f"{P}machine-0-{number}" for number in range(3)]
RETURN = f"{P}return-0-0000"

Script = Callable[[WriteLog], None]


def examined(path: Path, stored: dict[str, Any], base: dict[str, Any], *scripts: Script):  # type: ignore[no-untyped-def]
    """The verification of process logs, one script per process."""
    notes = []
    for number, script in enumerate(scripts):
        file = path / f"{number}.notes"
        file.unlink(missing_ok=True)
        with WriteLog(file) as write_log:
            script(write_log)
        # The first process is the one that was killed.
        notes.append(ProcessLog.of(file, killed=not number))
    names = ("templates", "requests", "machines")
    return Verifier(
        notes,
        {name: base.get(name, {}) for name in names},
        {name: stored.get(name, {}) for name in names},
        Schema(HOST_FACTORY),
        P,
    )


def broken(path: Path, stored: dict[str, Any], *scripts: Script, **base: Any) -> dict[str, str]:
    """The first failure of each violated invariant."""
    invariants = examined(path, stored, base, *scripts).invariants()
    return {each.name: each.failures[0] for each in invariants if each.failures}


def noted(work: str, *writes: tuple[Write, list[Answer] | None], whole: bool = False) -> Script:
    """Log one operation; without results it was still running at the end."""

    def script(write_log: WriteLog) -> None:
        number = write_log.intent(work, [each for each, _ in writes], whole=whole)
        answers = [each for _, each in writes if each is not None]
        if answers:
            write_log.done(number, answers, 0.1)

    return script


def burst(answers: bool = True) -> Script:
    request = Write("requests", "create", [REQUEST], {"status": "PENDING"})
    machines = Write("machines", "create", MACHINES, {"request_id": REQUEST, "status": "pending"})
    return noted(
        "acquire",
        (request, [1] if answers else None),
        (machines, [1, 1, 1] if answers else None),
        whole=True,
    )


def a_request(**fields: Any) -> dict[str, Any]:
    made = {"request_type": "acquire", "status": "COMPLETED", "machine_count": 3, "version": 1}
    return {"request_id": REQUEST, **made, **fields}


def a_machine(name: str, **fields: Any) -> dict[str, Any]:
    made = {"machine_id": name, "request_id": REQUEST, "status": "pending", "version": 1}
    return {**made, **fields}


def stored_burst(machines: list[str] = MACHINES, **fields: Any) -> dict[str, Any]:
    return {
        "requests": {REQUEST: a_request(status="PENDING", **fields)},
        "machines": {each: a_machine(each) for each in machines},
    }


def sequence(*scripts: Script) -> Script:
    def script(write_log: WriteLog) -> None:
        for each in scripts:
            each(write_log)

    return script


# -- operations that were running at a kill may have been applied, or not --------------------


def test_an_unfinished_burst_may_exist_completely(tmp_path: Path) -> None:
    assert "transactions" not in broken(tmp_path, stored_burst(), burst(answers=False))


def test_an_unfinished_burst_may_be_missing(tmp_path: Path) -> None:
    assert broken(tmp_path, {}, burst(answers=False)) == {}


@pytest.mark.parametrize("there", [[], MACHINES[:2]])
def test_an_unfinished_burst_must_not_exist_in_part(tmp_path: Path, there: list[str]) -> None:
    seen = broken(tmp_path, stored_burst(there), burst(answers=False))
    assert seen["transactions"].startswith("machines/demo-1-machine-0-")
    assert "is not there, and other parts of its acquire are" in seen["transactions"]
    assert seen["counts"].startswith(f"requests/{REQUEST}: 3 machines, 0 went back")


def test_an_acknowledged_burst_must_exist(tmp_path: Path) -> None:
    seen = broken(tmp_path, {}, burst())
    assert seen.keys() == {"acknowledged", "transactions"}
    assert "is gone; version 1 was acknowledged" in seen["acknowledged"]


STEP = Write("templates", "add", ["t"], {"uses": 1})


@pytest.mark.parametrize(
    ("uses", "version", "holds"), [(4, 3, True), (5, 4, True), (6, 5, False), (3, 2, False)]
)
def test_a_counter_may_be_one_ahead_per_unfinished_increment(
    tmp_path: Path, uses: int, version: int, holds: bool
) -> None:
    base = {"t": {"template_id": "t", "uses": 2, "version": 1}}
    steps = sequence(noted("count", (STEP, [2])), noted("count", (STEP, [3])))
    stored = {"templates": {"t": {"template_id": "t", "uses": uses, "version": version}}}
    seen = broken(tmp_path, stored, noted("count", (STEP, None)), steps, templates=base)
    assert (seen == {}) is holds
    assert holds or seen["counters"] == f"templates/t: counts {uses}, 4 were acknowledged"


def test_applied_unfinished_operations_are_counted(tmp_path: Path) -> None:
    base = {"templates": {"t": {"template_id": "t", "uses": 0, "version": 1}}}
    stored = {"templates": {"t": {"template_id": "t", "uses": 2, "version": 3}}, **stored_burst()}
    lost = noted("count", (STEP, None))
    seen = examined(tmp_path, stored, base, sequence(lost, lost, lost, burst(answers=False)))
    assert seen.applied(ProcessLog.of(tmp_path / "0.notes").unanswered) == 3


def test_an_unapplied_return_is_not_confused_with_that_of_another_process(tmp_path: Path) -> None:
    """The killed process wanted a machine that another returned, and that is gone since."""
    mark = Write("machines", "update", MACHINES[:1], {"return_request_id": RETURN})
    killed = noted(
        "return", (Write("requests", "create", [RETURN]), None), (mark, None), whole=True
    )
    gone = noted("terminate", (Write("machines", "delete", MACHINES[:1]), ["deleted"]), whole=True)
    stored = {"machines": {}}
    seen = broken(tmp_path, stored, killed, gone, machines={MACHINES[0]: a_machine(MACHINES[0])})
    assert seen == {}


def test_an_unapplied_termination_is_not_confused_with_a_later_one(tmp_path: Path) -> None:
    """The sweep terminates what the killed process was about to: with another time in it."""

    def end(at: str, answered: bool) -> Script:
        done = Write("requests", "update", [RETURN], {"status": "COMPLETED", "completed_at": at})
        return noted(
            "terminate",
            (Write("machines", "delete", MACHINES[:1]), ["deleted"] if answered else None),
            (done, [2] if answered else None),
            whole=True,
        )

    first, second = "2026-01-01T00:00:00.000000Z", "2026-01-01T00:00:01.000000Z"
    back = a_request(request_id=RETURN, request_type="return", status="PENDING")
    now = {**back, "status": "COMPLETED", "completed_at": second, "version": 2}
    stored = {"requests": {RETURN: {**now, "metadata": {"of": "x"}}}}
    base = {"requests": {RETURN: {**back, "metadata": {"of": "x"}}}}
    base["machines"] = {MACHINES[0]: a_machine(MACHINES[0])}
    seen = broken(tmp_path, stored, end(first, False), end(second, True), **base)
    assert seen == {}


def test_entities_created_by_the_killed_process_may_exist(tmp_path: Path) -> None:
    create = noted("create", (Write("requests", "create", [REQUEST]), [1]))
    batch = noted("create batch", (Write("machines", "create", MACHINES), None))
    stored = {"requests": {REQUEST: a_request(status="creating")}}
    assert broken(tmp_path, stored, sequence(create, batch)) == {}
    nobody = sequence()
    assert broken(tmp_path, stored, nobody, create).keys() == {"finished"}


def test_a_running_process_must_not_have_unfinished_writes(tmp_path: Path) -> None:
    seen = broken(tmp_path, {}, sequence(), burst(answers=False))
    assert seen == {"finished": f"requests/{REQUEST}: acquire was never answered"}


# -- violations that are always reported -----------------------------------------------------


def test_one_version_for_two_writers(tmp_path: Path) -> None:
    base = {"t": {"template_id": "t", "uses": 0, "version": 1}}
    stored = {"templates": {"t": {"template_id": "t", "uses": 2, "version": 2}}}
    writers = noted("count", (STEP, [2])), noted("count", (STEP, [2]))
    seen = broken(tmp_path, stored, *writers, templates=base)
    assert seen["versions"] == "templates/t: version 2 was acknowledged to two writers"


def test_a_deleted_entity_that_exists_again(tmp_path: Path) -> None:
    name = MACHINES[0]
    gone = noted("terminate", (Write("machines", "delete", [name]), ["deleted"]))
    stored = {"machines": {name: a_machine(name, request_id=None)}}
    seen = broken(tmp_path, stored, gone, machines={name: a_machine(name, request_id=None)})
    assert seen == {"acknowledged": f"machines/{name}: is there, and its delete was acknowledged"}


def test_an_orphan(tmp_path: Path) -> None:
    stored = {"machines": {MACHINES[0]: a_machine(MACHINES[0], return_request_id=RETURN)}}
    base = {"machines": stored["machines"]}
    failures = [
        failure
        for each in examined(tmp_path, stored, base).invariants()
        for failure in each.failures
    ]
    assert failures == [
        f"machines/{MACHINES[0]}: request_id names '{REQUEST}', which is not there",
        f"machines/{MACHINES[0]}: return_request_id names '{RETURN}', which is not there",
    ]


@pytest.mark.parametrize(
    ("field", "was", "now"),
    [("ratio", 1.0, 1), ("flag", True, 1), ("note", None, "x"), ("tags", {"a": [1]}, {"a": [1.0]})],
)
def test_a_loaded_value_of_another_type(
    tmp_path: Path, field: str, was: object, now: object
) -> None:
    base = {"templates": {"t": {"template_id": "t", field: was}}}
    stored = {"templates": {"t": {"template_id": "t", field: now, "version": 0}}}
    seen = broken(tmp_path, stored, **base)
    assert seen == {"loaded": f"templates/t: {field} was {was!r}, is {now!r}"}


def test_one_timestamp_in_several_forms_is_equal(tmp_path: Path) -> None:
    base = {"templates": {"t": {"template_id": "t", "created_at": "2026-06-01T10:00:00+02:00"}}}
    fixed = {"template_id": "t", "created_at": "2026-06-01T08:00:00.000000Z", "version": 0}
    assert broken(tmp_path, {"templates": {"t": fixed}}, **base) == {}


# -- claims ----------------------------------------------------------------------------------


def held(token: int, began: float, until: float, *, ended: bool = True) -> Script:
    return lambda write_log: write_log.note(Hold(REQUEST, token, began, until, ended))


def test_claims_of_one_request_follow_each_other(tmp_path: Path) -> None:
    assert broken(tmp_path, {}, held(1, 0.0, 2.0), held(2, 2.0, 3.0)) == {}


def test_two_holders_at_once(tmp_path: Path) -> None:
    seen = broken(tmp_path, {}, held(1, 0.0, 2.0), held(2, 1.5, 3.0))
    assert seen == {"holders": f"requests/{REQUEST}: claim 2 began -0.50 s after claim 1 ended"}


def test_a_later_claim_has_a_greater_token(tmp_path: Path) -> None:
    seen = broken(tmp_path, {}, held(2, 0.0, 1.0), held(2, 2.0, 3.0))
    assert seen == {"holders": f"requests/{REQUEST}: claim 2 began 1.00 s after claim 2 ended"}


@pytest.mark.parametrize(("began", "holds"), [(2.9, False), (3.1, True)])
def test_a_killed_holder_keeps_its_claim_until_its_lease_ends(
    tmp_path: Path, began: float, holds: bool
) -> None:
    killed = sequence(held(1, 0.0, 3.0, ended=False))
    seen = broken(tmp_path, {}, killed, held(2, began, 5.0))
    assert (seen == {}) is holds
    verifier = examined(tmp_path, {}, {}, killed, held(2, began, 5.0))
    assert [verifier.taken_over(each) for each in verifier.logs] == [1, 0]


def test_the_last_note_of_a_claim_counts(tmp_path: Path) -> None:
    """It was ended before its lease had."""
    first = sequence(held(1, 0.0, 3.0, ended=False), held(1, 0.0, 1.0))
    assert broken(tmp_path, {}, first, held(2, 1.5, 2.0)) == {}


def test_a_write_under_a_lost_claim_is_in_doubt(tmp_path: Path) -> None:
    """It may have been applied or not, and the process that lost the claim goes on."""
    base = {"t": {"template_id": "t", "uses": 2, "version": 1}}

    def cancelled(write_log: WriteLog) -> None:
        write_log.done(write_log.intent("count", [STEP]), [])

    for uses in (2, 3, 4):
        stored: dict[str, Any] = {
            "templates": {"t": {"template_id": "t", "uses": uses, "version": uses - 1}}
        }
        seen = broken(tmp_path, stored, sequence(), cancelled, templates=base)
        assert (seen == {}) is (uses < 4)


# -- what a watcher heard --------------------------------------------------------------------


def put(version: int, status: str) -> EntityChange:
    return EntityChange("put", REQUEST, version, {"status": status, "version": version}, "")


def gone(version: int) -> EntityChange:
    return EntityChange("delete", REQUEST, version, None, "")


NEW, DONE = put(1, "PENDING"), put(2, "COMPLETED")


@pytest.mark.parametrize(
    ("unanswered", "heard", "wrong"),
    [
        (0, [NEW, DONE, gone(2)], None),
        (0, [NEW, NEW, DONE, gone(2), gone(2)], None),
        (0, [NEW, DONE], "was acknowledged after version 2 as well, and that did not come"),
        (0, [], "was acknowledged after version 0 as well"),
        (0, [DONE, gone(2)], "in a wrong order: [('put', 2), ('delete', 2)]"),
        (0, [NEW, gone(1)], "was acknowledged after version 1 as well"),
        (0, [NEW, gone(2)], "in a wrong order"),
        (0, [NEW, DONE, NEW, DONE, gone(2)], "in a wrong order"),
        (0, [NEW, DONE, gone(2), NEW], "in a wrong order"),
        (
            0,
            [NEW, put(2, "FAILED"), gone(2)],
            "version 2 came without status 'COMPLETED', as acknowledged",
        ),
        (0, [NEW, DONE, put(3, "x"), gone(3)], "delete of version 3 came, and nobody made it"),
        (1, [NEW, DONE, put(3, "x"), gone(3)], None),
        (1, [NEW, DONE, gone(2)], None),
    ],
)
def test_what_came_through_the_feed(
    tmp_path: Path, unanswered: int, heard: list[EntityChange], wrong: str | None
) -> None:
    def write(kind: Any, answers: list[Answer] | None, **fields: object) -> Script:
        return noted(kind, (Write("requests", kind, [REQUEST], fields), answers))

    acknowledged = sequence(
        write("create", [1], status="PENDING"),
        write("update", [2], status="COMPLETED"),
        write("delete", ["deleted"]),
    )
    killed = sequence(*[write("update", None, status="x")] * unanswered)
    verifier = examined(tmp_path, {}, {}, killed, acknowledged)
    place = ("requests", REQUEST)
    assert verifier.to_come() == {(place, 1), (place, 2), (place, "deleted")}
    [*failures] = verifier.changes({place: heard}).failures
    assert len(failures) == (wrong is not None)
    assert wrong is None or wrong in failures[0]


def test_an_entity_that_nobody_wrote_is_heard(tmp_path: Path) -> None:
    verifier = examined(tmp_path, {}, {}, sequence())
    heard = {("requests", REQUEST): [NEW], ("requests", "of somebody else"): [NEW]}
    invariant = verifier.changes(heard)
    assert invariant.failures == [f"requests/{REQUEST}: put of version 1 came, and nobody made it"]


# -- the logs --------------------------------------------------------------------------------


def test_an_incomplete_last_line_is_caused_by_the_kill(tmp_path: Path) -> None:
    file = tmp_path / "torn.notes"
    with WriteLog(file) as write_log:
        burst()(write_log)
        burst(answers=False)(write_log)
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    assert len(ProcessLog.of(file).operations) == 1
    file.write_bytes(whole + b'{"type":"do')
    assert [
        len(each) for each in (ProcessLog.of(file).operations, ProcessLog.of(file).unanswered)
    ] == [2, 1]


def test_a_refused_write_is_not_unfinished(tmp_path: Path) -> None:
    file = tmp_path / "refused.notes"
    with WriteLog(file) as write_log:
        write_log.done(write_log.intent("acquire", [STEP]), None)
    notes = ProcessLog.of(file)
    assert (notes.operations, notes.unanswered) == ([], [])
