"""`doctor`: what it tells, what it finds wrong, and with which exit code."""

import jax
import pytest

from nanochat_jax import cli
from nanochat_jax.lm.runtime import installation, machine

VERSIONS = {"jax": "0.10.2", "jaxlib": "0.10.2", "numpy": "2.1"}
REQUIRES = {
    "jax": [
        "jaxlib<=0.10.2,>=0.10.1",
        'jaxlib==0.10.1; extra == "minimum-jaxlib"',
        'jaxlib<=0.10.2,>=0.10.2; extra == "cuda12"',
        'jax-cuda12-plugin[with-cuda]<=0.10.2,>=0.10.2; extra == "cuda12"',
        'numpy>=9; python_version < "3"',
    ]
}
SOUND = {"cpu:0": 1e-7}
GPU = {"jax-cuda13-plugin": "0.10.2"}


def unmet(**versions):
    installed = VERSIONS | {name.replace("_", "-"): v for name, v in versions.items()}
    version = lambda name: installed.get(name, "not installed")
    found = installation.unmet_requirements(
        installation.PACKAGES, version, REQUIRES.get
    )
    return [problem.what for problem in found]


@pytest.fixture
def sound(monkeypatch):
    """A machine on which nothing is wrong, whatever is installed on this one."""
    monkeypatch.setattr(installation, "unmet_requirements", list)
    monkeypatch.setattr(installation, "installed_plugins", dict)
    monkeypatch.setattr(installation, "has_nvidia_gpu", lambda: False)


def doctor(capsys):
    try:
        code = cli.main(["doctor"])
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().out


def test_a_sound_machine(sound, capsys):
    code, out = doctor(capsys)
    assert code == 0
    assert jax.__version__ in out
    for text in (
        "orbax-checkpoint",
        "threads",
        "bfloat16",
        "off by",
        "NVIDIA driver",
        "Nothing is",
    ):
        assert text in out


def test_a_product_on_this_machine_is_that_of_numpy():
    errors = installation.product_errors(jax.devices())
    assert len(errors) == len(jax.devices())
    assert installation.product_problems(errors) == []


def test_what_is_wrong_is_told_with_what_to_do(sound, monkeypatch, capsys):
    monkeypatch.setattr(installation, "has_nvidia_gpu", lambda: True)
    code, out = doctor(capsys)
    assert code == 1
    assert "Problem: there is an NVIDIA GPU, but JAX has no plugin for it." in out
    assert "nanochat-jax[cuda13]" in out
    assert "Nothing is" not in out


def test_without_devices_it_tells_the_rest(sound, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("Unable to initialize backend 'cuda'\nmore")

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    code, out = doctor(capsys)
    assert code == 1
    assert "JAX finds no device: Unable to initialize backend 'cuda'\n" in out
    assert "unset it" in out and "JAX_PLATFORMS" in out


@pytest.mark.parametrize(
    ("versions", "told"),
    [
        ({}, []),
        ({"jaxlib": "0.10.1"}, []),
        ({"jaxlib": "0.9.0"}, ["jax 0.10.2 needs jaxlib<=0.10.2,>=0.10.1"]),
        (
            {"jaxlib": "0.10.1", "jax_cuda12_plugin": "0.10.2"},
            ["jax 0.10.2 needs jaxlib<=0.10.2,>=0.10.2"],
        ),
        (
            {"jax_cuda12_plugin": "0.9.0"},
            ["jax 0.10.2 needs jax-cuda12-plugin<=0.10.2,>=0.10.2"],
        ),
    ],
)
def test_versions_that_do_not_fit_together_are_found(versions, told):
    found = unmet(**versions)
    assert len(found) == len(told)
    assert all(line.startswith(start) for line, start in zip(found, told, strict=True))


@pytest.mark.parametrize(
    ("plugins", "platforms", "has_gpu", "told"),
    [
        ({}, ["cpu"], False, None),
        (GPU, ["gpu", "cpu"], True, None),
        (GPU, ["cpu"], True, "JAX finds no GPU"),
        (GPU, ["cpu"], False, "no driver"),
        ({}, ["cpu"], True, "no plugin"),
        (GPU | {"jax-cuda12-plugin": "1"}, ["gpu"], True, "several"),
    ],
)
def test_what_keeps_jax_from_a_gpu_is_found(plugins, platforms, has_gpu, told):
    found = installation.plugin_problems(plugins, platforms, has_gpu)
    assert [told in problem.what for problem in found] == [True] * (told is not None)


@pytest.mark.parametrize(
    ("error", "told"),
    [(1e-3, "off by 1e-03"), (float("nan"), "off by nan"), ("OOM", "failed: OOM")],
)
def test_a_device_that_multiplies_wrongly_is_named(error, told):
    (problem,) = installation.product_problems(SOUND | {"gpu:1": error})
    assert problem.what.startswith("gpu:1") and told in problem.what


@pytest.mark.parametrize(
    ("enabled", "tunables", "told"),
    [
        ("[always] madvise never", "", "used"),
        ("always [madvise] never", "glibc.malloc.hugetlb=1:glibc.malloc.x=2", "used"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", "with GLIBC_TUNABLES="),
        ("always madvise [never]", "glibc.malloc.hugetlb=1", "turned off"),
        (None, "glibc.malloc.hugetlb=1", "not known"),
    ],
)
def test_large_pages_are_told_of(enabled, tunables, told, monkeypatch, tmp_path):
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    if enabled is not None:
        (tmp_path / "enabled").write_text(enabled + "\n")
    assert told in machine.large_pages(tmp_path / "enabled")
