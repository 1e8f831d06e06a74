"""Small models of real packages, a file for each group of them."""

import importlib
import pathlib
import tomllib

FILE = pathlib.Path(__file__).parent.parent / "environments.toml"


def of_environment(name: str) -> dict:
    """Returns what builds each tree of an environment, by the name of the tree."""
    modules = tomllib.loads(FILE.read_text())[name]["builders"]
    builders: dict = {}
    for module in modules:
        builders |= importlib.import_module(f"builders.{module}").BUILDERS
    return builders
