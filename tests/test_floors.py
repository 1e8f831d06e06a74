"""The library is built in floors: imports point down, and the top needs no more."""

import ast
import collections
import graphlib
import inspect
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nanochat_jax as nj

PACKAGE = Path(nj.__file__).parent
FLOORS = {
    0: ("numerics", "codecs", "polynomials"),
    1: ("transforms",),
    2: ("config",),
    3: ("optimizer", "interop"),
    4: ("lm",),
    5: ("experiments", "commands", "cli", "__main__"),
}
ROOMS = (
    "runtime", "model", "data", "huggingface", "checkpoints", "tracking", "training",
    "planning",
)  # fmt: skip
MOST_FILES = 14
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
TRAINER_ONLY = (
    "flax", "grain", "matplotlib", "orbax", "packaging", "rich", "safetensors",
    "tokenizers",
)  # fmt: skip
PUBLIC = {name: getattr(nj, name) for name in nj.__all__}


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


PACKAGES = [name for name, path in MODULES.items() if path.name == "__init__.py"]


def imports(path):
    """Returns the modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module or ""


def ours(path):
    return {name for name in imports(path) if name.split(".")[0] == PACKAGE.name}


def floor(module):
    """Returns the floor of a module, and its room if it is of the language model."""
    _, top, *below = module.split(".")
    room = ROOMS.index(below[0]) if top == "lm" and below else 0
    return FLOOR[top], room


def is_inside(module, package):
    return module == package or module.startswith(f"{package}.")


def ways_past(module, path):
    """Yields imports of what another package has not put into its `__init__`."""
    packages = {name for name, p in MODULES.items() if p.name == "__init__.py"}
    # These two are maps of their rooms and hold nothing themselves.
    packages -= {PACKAGE.name, f"{PACKAGE.name}.lm"}
    for name in ours(path):
        entered = [
            p for p in packages if is_inside(name, p) and not is_inside(module, p)
        ]
        if entered and name != min(entered, key=len):
            room, _, rest = name.removeprefix(min(entered, key=len)).rpartition(".")
            if room or rest not in surface(min(entered, key=len)):
                yield name


def surface(package):
    """Returns the names that a package offers: what its `__init__` imports."""
    tree = ast.parse(MODULES[package].read_text(encoding="utf-8"))
    froms = (node for node in tree.body if isinstance(node, ast.ImportFrom))
    return {alias.asname or alias.name for node in froms for alias in node.names}


@pytest.mark.parametrize("module", [name for name in MODULES if "." in name])
def test_imports_point_down_or_sideways(module):
    for name in ours(MODULES[module]):
        assert name != PACKAGE.name, f"{module} imports the package it is part of"
        assert floor(name) <= floor(module), f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_packages_are_entered_by_their_init(module):
    assert [*ways_past(module, MODULES[module])] == []


def test_no_folder_is_a_drawer():
    counts = collections.Counter(path.parent for path in MODULES.values())
    assert {str(p): n for p, n in counts.items() if n > MOST_FILES} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_map_of_a_package_has_all_of_its_rooms(package):
    folder = MODULES[package].parent
    rooms = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
    rooms |= {path.parent.name for path in folder.glob("*/__init__.py")}
    text = ast.get_docstring(ast.parse(MODULES[package].read_text(encoding="utf-8")))
    absent = {room for room in rooms if not re.search(rf"\b{room}\b", text)}
    assert absent - {"cli", "commands", "experiments"} == set()


def functions():
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield path.name, node


def test_functions_are_small_and_have_few_parameters():
    """But `muon`, whose keywords are those of `OptimizerConfig`."""
    large = []
    for file, node in functions():
        lines = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node):
            lines -= node.body[0].end_lineno - node.body[0].lineno + 1
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        few = sum(argument.arg not in ("self", "cls") for argument in arguments) <= 8
        if node.name != "muon" and not (lines <= 62 and few):
            large.append((file, node.name, lines, len(arguments)))
    assert large == []


def test_no_imports_go_in_a_circle():
    graph = {module: ours(path) - {module} for module, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_every_floor_is_there():
    top = {name.split(".")[1] for name in MODULES if "." in name}
    assert top - set(FLOOR) == set(), "name the floor of each new module"


@pytest.mark.parametrize("name", MODULES)
def test_only_the_trainer_imports_the_trainers_dependencies(name):
    found = {module.split(".")[0] for module in imports(MODULES[name])}
    if name.split(".")[1:2] == ["interop"]:  # inside functions, see below
        found -= {"flax"}
    allowed = name.split(".")[1:2] in (
        ["lm"], ["cli"], ["commands"], ["experiments"], ["__main__"]
    )  # fmt: skip
    assert allowed or not found & set(TRAINER_ONLY)


def test_importing_the_library_imports_neither_flax_nor_the_rest_of_the_trainer():
    code = (
        "import sys, nanochat_jax\n"
        f"print(sorted(set({TRAINER_ONLY!r}) & set(sys.modules)))\n"
        "print([name for name in sys.modules if name.startswith('nanochat_jax.lm')])"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "[]\n[]\n"


def callables(value):
    """Returns a public function, or the public methods of a class, by name."""
    if not inspect.isclass(value):
        return {value.__name__: value}
    members = {name: m for name, m in vars(value).items() if name[0] != "_"}
    methods = {}
    for name, member in members.items():
        if isinstance(member, property):
            member = member.fget
        elif isinstance(member, classmethod | staticmethod):
            member = member.__func__
        if inspect.isfunction(member):
            methods[name] = member
    return methods


def test_the_top_of_the_package_is_a_page():
    assert len(PUBLIC) <= 44, "further names are in the `__init__` of their packages"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented_and_typed(name):
    value = PUBLIC[name]
    if not callable(value):  # a constant: its docstring is the string after it
        return
    # Dataclasses and NamedTuples without a docstring get their signature for one.
    doc = inspect.getdoc(value) or ""
    assert doc.split("\n")[0].endswith("."), f"{name} has no docstring"
    assert not doc.startswith(f"{name}(")
    for part, function in callables(value).items():
        assert inspect.getdoc(function), f"{name}: {part} has no docstring"
        hints = inspect.unwrap(function).__annotations__
        parameters = set(inspect.signature(function).parameters) - {"self", "cls"}
        missing = (parameters | {"return"}) - set(hints)
        assert not missing, f"{name}: {part} has no annotation of {sorted(missing)}"


def constants_with_docstrings():
    """Returns the names assigned at the top of a module before a string."""
    found = set()
    for path in MODULES.values():
        body = ast.parse(path.read_text(encoding="utf-8")).body
        for node, after in itertools.pairwise(body):
            text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(node, ast.Assign | ast.AnnAssign) and text:
                targets = (
                    node.targets if isinstance(node, ast.Assign) else [node.target]
                )
                found |= {ast.unparse(target) for target in targets}
    return found


def test_public_constants_are_documented():
    constants = {name for name, value in PUBLIC.items() if not callable(value)}
    assert constants <= constants_with_docstrings()
