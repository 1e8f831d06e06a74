"""Several processes that train one model together: how they start, meet and end.

Each process runs the same program on its own devices. Process 0 alone logs and writes
metrics; all processes write checkpoints.
"""

import contextlib
import ipaddress
import os
import socket
import time
from collections.abc import Iterator, Mapping

import jax

from nanochat_jax.config import schema
from nanochat_jax.lm.runtime.watchdog import coordination_client

START_SECONDS = 300
"""How long processes wait for each other to start."""

COMPILE_SECONDS = 1800
"""How long processes that have compiled wait for the others."""

# Environment variables in which launchers give the number of processes.
_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    env: Mapping[str, str] = os.environ,
    timeout: int = START_SECONDS,
) -> Iterator[None]:
    """Joins the other processes, if there are any, and leaves them in order.

    Without arguments, the environment of SLURM or Open MPI gives the other processes.
    To be entered before anything asks for devices. After an exception a process leaves
    at once, since the others wait for results that it will not compute.

    Args:
      coordinator: Where process 0 listens, `HOST:PORT`.
      num_processes: Number of processes.
      process_id: Number of this one, from 0.
      env: Environment variables.
      timeout: Seconds to wait for the others.

    Raises:
      ValueError: If the arguments are invalid, or process 0 does not answer.
    """
    given = (coordinator, num_processes, process_id)
    if coordinator is not None and num_processes is not None and process_id is not None:
        _check(coordinator, num_processes, process_id, env)
        if process_id > 0:
            _await_coordinator(coordinator, timeout)
    elif any(value is not None for value in given):
        raise ValueError(
            "`--coordinator`, `--num-processes` and `--process-id` must be given "
            f"together, got {given}. Under SLURM and Open MPI none is needed."
        )
    elif not _is_launched(env):
        yield
        return
    # JAX's own handler of SIGTERM would replace that of `StopSignals`.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(*given, initialization_timeout=timeout)
    yield
    jax.distributed.shutdown()


def is_first() -> bool:
    """Returns whether this process is the one that logs."""
    return jax.process_index() == 0


def meet(name: str, timeout: int = COMPILE_SECONDS) -> None:
    """Waits until all processes have called this.

    CPU collectives time out after 30 s; a process still compiling can exceed that.

    Args:
      name: Name of the barrier; use each name once.
      timeout: Seconds to wait.

    Raises:
      TimeoutError: If processes are missing; the message names them.
    """
    client = coordination_client()
    if client is None:
        return
    client.key_value_set(f"{name}/{jax.process_index()}", "here")
    try:
        client.wait_at_barrier(name, 1000 * timeout)
    except jax.errors.JaxRuntimeError as error:
        here = {key.rpartition("/")[2] for key, _ in client.key_value_dir_get(name)}
        missing = [i for i in range(jax.process_count()) if str(i) not in here]
        raise TimeoutError(
            f"processes {missing} did not come to `{name}` within {timeout} s. Look "
            "into what they print, and at the machines they are on."
        ) from error


def _is_launched(env: Mapping[str, str]) -> bool:
    """Returns whether SLURM or Open MPI has started several processes."""
    return any(int(env.get(name, 1)) > 1 for name in _LAUNCHERS)


def _check(
    coordinator: str, num_processes: int, process_id: int, env: Mapping[str, str]
) -> None:
    host, _, port = coordinator.rpartition(":")
    schema.require(
        (
            bool(host) and port.isdecimal(),
            f"`--coordinator` must be HOST:PORT, got {coordinator!r}.",
        ),
        (
            0 <= process_id < num_processes,
            "`--process-id` must be from 0 to `--num-processes` - 1, got "
            f"{process_id} of {num_processes}.",
        ),
        (
            not (_is_loopback(host) and _several_hosts(env)),
            f"`--coordinator {coordinator}` is each host itself, but the processes are "
            "on several hosts. Give the name or the address by which the others know "
            "the host of process 0.",
        ),
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def _several_hosts(env: Mapping[str, str]) -> bool:
    """Returns whether SLURM or Open MPI says that processes are on several hosts."""
    number = lambda name: int(env.get(name, 1))
    nodes = max(number("SLURM_STEP_NUM_NODES"), number("SLURM_JOB_NUM_NODES"))
    local = number("OMPI_COMM_WORLD_LOCAL_SIZE")
    return nodes > 1 or number("OMPI_COMM_WORLD_SIZE") > local


def _await_coordinator(coordinator: str, timeout: float) -> None:
    """Waits for process 0 to listen; JAX would end this process without a message."""
    host, _, port = coordinator.rpartition(":")
    until, why = time.monotonic() + timeout, ""
    while time.monotonic() < until:
        try:
            socket.create_connection((host.strip("[]"), int(port)), 1).close()
            return
        except OSError as error:
            why = str(error)
            time.sleep(0.1)
    raise ValueError(
        f"nothing answers at `--coordinator {coordinator}` in {timeout:g} s ({why}). "
        "Start process 0 there, and give the name or address of its host by which this "
        "one knows it; `localhost` will do only if it is the same."
    )
