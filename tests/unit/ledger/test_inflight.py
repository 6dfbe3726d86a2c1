"""inflight.json is a hint: colleagues may share it, and a run continues without it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from other_user import shared_folder, umask, unprivileged

from gxr_batch.errors import ApiOutage, EngineFailed, EngineUnavailable, StorageError
from gxr_batch.ledger import open_run
from gxr_batch.ledger.boot import boot_id
from gxr_batch.ledger.inflight import INFLIGHT_NAME, InFlight
from gxr_batch.records import Key

KEY = Key("C1", 1)


def taken(folder: Path) -> InFlight:
    hint = InFlight(folder)
    hint.take(KEY)
    return hint


def test_its_permissions_follow_the_umask(tmp_path):
    with umask(0o002):
        taken(tmp_path)
    assert (tmp_path / INFLIGHT_NAME).stat().st_mode & 0o777 == 0o664


def test_the_hint_of_a_colleague_is_replaced():
    with shared_folder() as folder:
        path = folder / INFLIGHT_NAME
        path.write_text(json.dumps({"boot": "", "crashes": [["C9", 1, 1]], "in_flight": []}))
        path.chmod(0o444)
        with unprivileged():
            hint = taken(folder)
        assert hint.failure == ""
        assert hint.known == [Key("C9", 1)], "what it said is kept"
        assert json.loads(path.read_text())["in_flight"] == [list(KEY)]


@pytest.mark.parametrize("impossible", [("C1", 0), ("C1", -1), ("C1", -5), ("\ud800", 1)])
@pytest.mark.parametrize("name", ["crashes", "in_flight"])
def test_a_hint_with_a_key_that_no_row_has_is_ignored(tmp_path, name, impossible):
    content = {"boot": boot_id(), "crashes": [["C1", 1, 1]], "in_flight": []}
    entry = [*impossible, 1] if name == "crashes" else list(impossible)
    (tmp_path / INFLIGHT_NAME).write_text(json.dumps(content | {name: [entry]}))
    assert InFlight(tmp_path).known == []


def test_a_hint_that_cannot_be_written_is_remembered_and_raises_nothing():
    with shared_folder() as folder:
        folder.chmod(0o555)
        with unprivileged():
            hint = taken(folder)
            hint.keep({KEY})
            hint.settle(KEY)
            hint.close(in_order=True)
        assert hint.failure == "Permission denied"
        assert os.listdir(folder) == []


@pytest.mark.parametrize(
    ("error", "suspects"),
    [(EngineFailed, [KEY]), (ValueError, [KEY]), (EngineUnavailable, []), (ApiOutage, []), (StorageError, [])],
)
def test_rows_are_suspects_only_after_an_end_that_a_row_can_cause(tmp_path, error, suspects):
    def end() -> None:
        with open_run(tmp_path) as ledger:
            ledger.in_flight.take(KEY)
            raise error("It ended.")

    with pytest.raises(error):
        end()
    assert InFlight(tmp_path).known == suspects
