"""The watchdog ends a hang, and is patient with a process that others keep from running."""

from __future__ import annotations

import time

import pytest

from peftcheck import generator
from peftcheck.case import Sweep
from peftcheck.implementations.reference import Reference
from peftcheck.watchdog import Hung, Watchdog


@pytest.fixture
def watch(tmp_path, monkeypatch):
    variant = Reference().variants()["lora"]
    case = generator.draw(variant, Sweep("reference", "lora", "linear", "float32", None), 0, 0, False)
    dog = Watchdog(tmp_path, "sweep", 0.2)
    yield lambda: dog.watch(case, "merge.oracle")
    dog.close()


def test_a_busy_library_is_given_up_after_its_time(watch):
    with pytest.raises(Hung), watch():
        until = time.monotonic() + 60
        while time.monotonic() < until:
            pass


def test_a_waiting_library_is_given_up_too(watch):
    with pytest.raises(Hung), watch():
        time.sleep(60)


def test_a_process_that_others_keep_from_running_is_left_alone(watch, monkeypatch):
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    with watch():  # twice the time of a case, of which the process had none
        until = time.monotonic() + 0.45
        while time.monotonic() < until:
            pass
