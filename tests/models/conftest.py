"""The trees of one environment, and the record that the summary is made of."""

import functools
import json
import os
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes longer than running what is compiled.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

from builders import of_environment

RECORDS: list[dict] = []


def pytest_addoption(parser):
    parser.addoption("--environment", help="whose packages are installed here")
    parser.addoption("--records", help="file for what was found, leaf by leaf")


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("environment")
        metafunc.parametrize("name", of_environment(chosen), scope="module")


@functools.cache
def _build(environment, name):
    try:
        return of_environment(environment)[name]()
    except ImportError as error:
        return error


@pytest.fixture
def tree(name, pytestconfig):
    built = _build(pytestconfig.getoption("environment"), name)
    if isinstance(built, ImportError):
        RECORDS.append({"tree": name, "skipped": str(built)})
        pytest.skip(f"{name}: {built}")
    return built


def pytest_sessionfinish(session):
    path = session.config.getoption("records")
    if path:
        pathlib.Path(path).write_text(json.dumps(RECORDS, indent=1))
