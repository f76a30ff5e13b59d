"""A slice of `make fuzz`: no mutant of a packed checkpoint or an adapter is loaded with other numbers in silence."""

import importlib.util
import pathlib
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "fuzz_checkpoints.py"


@pytest.fixture(scope="module")
def fuzz():
    sys.path[:0] = [str(SCRIPT.parent)]  # for the mutations
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def subjects(fuzz, tmp_path_factory):
    return fuzz.make_subjects(tmp_path_factory.mktemp("fuzz"))


def faults(fuzz, subjects, count, seed, folder):
    numbers = range(count)
    tried = (fuzz.try_mutant(subjects[n % len(subjects)], n, seed, folder) for n in numbers)
    return [outcome for outcome in tried if outcome.verdict in fuzz.BAD]


def test_packed_checkpoints(fuzz, subjects, tmp_path):
    assert not faults(fuzz, subjects[0], 60, 1, tmp_path)


def test_adapters(fuzz, subjects, tmp_path):
    assert not faults(fuzz, subjects[1], 45, 1, tmp_path)


def test_the_same_mutant_every_time(fuzz, subjects, tmp_path):
    for subject in (*subjects[0], *subjects[1]):
        first, second = (fuzz.try_mutant(subject, 5, 3, tmp_path) for _ in range(2))
        assert (first.change, first.verdict) == (second.change, second.verdict)
