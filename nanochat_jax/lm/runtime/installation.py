"""Faults of an installation of JAX, each with its remedy."""

import os
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from packaging.requirements import Requirement

from nanochat_jax.lm.runtime.machine import version_of

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
OPTIONAL = (
    "jinja2",
    "matplotlib",
    "pyarrow",
    "tensorboardX",
    "transformers",
    "wandb",
)
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
# Environment variables that choose the devices of JAX, or change its programs.
VARIABLES = ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "XLA_FLAGS")
_TOLERANCE = 1e-5

Device = Any  # `jax.Device`, which is a variable for type checkers


class Problem(NamedTuple):
    """A fault, and its remedy."""

    what: str
    remedy: str


def unmet_requirements(
    packages: Iterable[str] = (*PACKAGES, *PLUGINS, "nanochat-jax"),
    version: Callable[[str], str] = version_of,
    requires: Callable[[str], list[str] | None] = metadata.requires,
) -> list[Problem]:
    """Returns packages whose version is not the one that another package requires.

    Args:
      packages: Packages whose requirements are checked, if they are installed.
      version: Returns the version of a package.
      requires: Returns the requirements of a package.
    """
    installed = lambda package: version(package) != "not installed"
    # JAX pins the version of a plugin in an extra of this name.
    cuda = [plugin.split("-")[1] for plugin in PLUGINS if installed(plugin)]
    extras = ("", "train", *cuda)
    problems = []
    for package in filter(installed, packages):
        for requirement in map(Requirement, requires(package) or ()):
            found = version(requirement.name)
            if not installed(requirement.name) or not _applies(requirement, extras):
                continue
            if not requirement.specifier.contains(found, prereleases=True):
                wanted = f"{requirement.name}{requirement.specifier}"
                what = (
                    f"{package} {version(package)} needs {wanted}, but "
                    f"{requirement.name} {found} is installed."
                )
                problems.append(Problem(what, f"pip install '{wanted}'"))
    return problems


def plugin_problems(
    plugins: Mapping[str, str], platforms: Iterable[str], has_gpu: bool
) -> list[Problem]:
    """Returns the reasons why JAX cannot use an NVIDIA GPU.

    Args:
      plugins: Installed CUDA plugins, with their versions.
      platforms: Platforms of the devices that JAX finds.
      has_gpu: Whether the driver of an NVIDIA GPU is loaded.
    """
    checks = (
        (
            len(plugins) > 1,
            f"several CUDA plugins are installed: {', '.join(plugins)}.",
            "uninstall one of them with its packages, jax-cuda..-plugin and -pjrt.",
        ),
        (
            has_gpu and not plugins,
            "there is an NVIDIA GPU, but JAX has no plugin for it.",
            "pip install 'nanochat-jax[cuda13]', or [cuda12] for drivers before 580.",
        ),
        (
            bool(plugins) and not has_gpu,
            "a CUDA plugin is installed, but no driver of an NVIDIA GPU is loaded.",
            "install the driver, give the container the GPU (docker run --gpus all), "
            "or uninstall the plugin.",
        ),
        (
            bool(plugins) and has_gpu and "gpu" not in platforms,
            "a CUDA plugin is installed, but JAX finds no GPU.",
            "see that nvidia-smi lists one, that JAX_PLATFORMS and "
            "CUDA_VISIBLE_DEVICES do not hide it, and that LD_LIBRARY_PATH does not "
            "lead to another CUDA.",
        ),
    )
    return [Problem(what, remedy) for wrong, what, remedy in checks if wrong]


def product_problems(errors: Mapping[str, float | str]) -> list[Problem]:
    """Returns devices whose product of matrices is not that of NumPy.

    Args:
      errors: Relative error by device, or the message of a product that failed.
    """
    problems = []
    for device, error in errors.items():
        if isinstance(error, str):
            what = f"{device}: a product of matrices failed: {error}"
            problems.append(Problem(what, _MEMORY_REMEDY))
        elif not error <= _TOLERANCE:
            what = f"{device}: a product of matrices is off by {error:.0e}."
            problems.append(Problem(what, "do not train on this device."))
    return problems


def product_errors(devices: Iterable[Device]) -> dict[str, float | str]:
    """Returns the relative error of a product on each device, or its message."""
    errors: dict[str, float | str] = {}
    for device in devices:
        try:
            errors[str(device)] = matmul_error(device)
        except jax.errors.JaxRuntimeError as error:
            errors[str(device)] = str(error).partition("\n")[0]
    return errors


def matmul_error(device: Device, size: int = 256) -> float:
    """Returns the relative error of a float32 product, against NumPy's in float64.

    Args:
      device: Device to compute on.
      size: Rows and columns of the matrices.
    """
    a, b = np.random.default_rng(0).standard_normal((2, size, size), np.float32)
    put = lambda x: jax.device_put(x, device)
    ours = jnp.matmul(put(a), put(b), precision="highest")
    exact = a.astype(np.float64) @ b.astype(np.float64)
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))


def installed_plugins() -> dict[str, str]:
    """Returns the versions of the installed CUDA plugins, by name."""
    found = {name: version_of(name) for name in PLUGINS}
    return {name: v for name, v in found.items() if v != "not installed"}


def has_nvidia_gpu() -> bool:
    """Returns whether the driver of an NVIDIA GPU is loaded, on Linux."""
    return Path("/proc/driver/nvidia/version").exists()


def variables() -> dict[str, str]:
    """Returns the environment variables of `VARIABLES` that are set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def _applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": e}) for e in extras)


_MEMORY_REMEDY = (
    "see that no other process holds the memory of the device; with "
    "XLA_PYTHON_CLIENT_PREALLOCATE=false each takes only what it needs."
)
