"""Skips all tests where PyTorch and transformers are absent."""

import importlib.util

import pytest


def pytest_collection_modifyitems(items):
    absent = [
        name for name in ("torch", "transformers") if not importlib.util.find_spec(name)
    ]
    for item in items if absent else []:
        item.add_marker(pytest.mark.skip(f"{' and '.join(absent)} not installed"))
