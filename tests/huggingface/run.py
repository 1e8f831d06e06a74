"""Installs transformers and PyTorch, and compares models with them.

    python tests/huggingface/run.py

The environment is made once, in `.venv-models`, by the machinery of `tests/models`. If
it cannot be installed, that is said, and nothing is compared.
"""

import importlib.util
import pathlib
import subprocess
import sys
import tomllib

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
NAME = "huggingface"


def main() -> int:
    """Runs the comparisons; returns their exit code, 0 if nothing is installed."""
    models = _load(HERE.parent / "models" / "run.py")
    wanted = tomllib.loads((HERE / "environments.toml").read_text())[NAME]
    problems = models._install(NAME, wanted)
    if problems:
        print("Skipped, what cannot be installed:", *problems, sep="\n  ")
        return 0
    tests = [HERE, HERE.parent / "test_text_data.py"]
    command = [models._python(NAME), "-m", "pytest", "-c", HERE / "pytest.ini", *tests]
    return subprocess.run(command, cwd=ROOT).returncode


def _load(path: pathlib.Path):
    """Returns the module of a file outside of packages."""
    spec = importlib.util.spec_from_file_location("models_run", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
