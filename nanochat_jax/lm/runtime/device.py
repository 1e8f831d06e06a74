"""Which device a run computes on; there is no fallback from one to another."""

import os

import jax


def use(device: str, threads: int | None = None) -> None:
    """Settles the device of this process, before anything is computed.

    Args:
      device: `"auto"` for JAX's default, `"cpu"` or `"gpu"`.
      threads: Processors to use on the CPU; all if not given.

    Raises:
      ValueError: If the device is not there, or `threads` cannot be had.
    """
    if threads is not None:
        _limit_threads(threads)
    if device == "auto":
        return
    jax.config.update("jax_platforms", device)
    try:
        jax.devices()
    # JAX asserts that there is a backend, without a message.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"`--device {device}`: JAX {jax.__version__} finds no such device"
            f"{f' ({error})' if str(error) else ''}. For an NVIDIA GPU install "
            "`nanochat-jax[cuda13]`, or [cuda12] for drivers before 580; or pass "
            "`--device cpu`."
        ) from None


def describe() -> str:
    """Returns the devices in words, such as `"1 CPU device, 2 threads"`."""
    devices = jax.devices()
    platform, plural = devices[0].platform, "s" if len(devices) > 1 else ""
    text = f"{len(devices)} {platform.upper()} device{plural}"
    if platform == "cpu":
        threads = available_threads()
        return f"{text}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{text} ({devices[0].device_kind})"


def available_threads() -> int:
    """Returns how many threads of the processor this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _limit_threads(threads: int) -> None:
    # XLA sizes its thread pool by the processors this process may run on.
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError("`--threads` needs Linux; leave it out to use all processors.")
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(allowed):
        raise ValueError(
            f"`--threads` must lie between 1 and {len(allowed)}, the processors this "
            f"process may use, got {threads}."
        )
    os.sched_setaffinity(0, allowed[:threads])
