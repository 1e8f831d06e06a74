"""A stop that all processes agree on, though one alone is asked for it."""

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from nanochat_jax.lm.runtime.stop import StopSignals
from nanochat_jax.lm.runtime.watchdog import Watchdog


@contextlib.contextmanager
def stopping(mesh: Mesh | None) -> Iterator["StopSignals | SharedStop"]:
    """Yields what tells after each step whether to stop, and watches over the others.

    Args:
      mesh: Devices of all processes; needed if there are several.
    """
    with StopSignals() as own:
        if mesh is None or jax.process_count() == 1:
            yield own
            return
        with Watchdog() as watch:
            yield SharedStop(own, mesh, watch.at)


class SharedStop:
    """Has all processes stop after the same step, once one of them is asked to.

    After each step the devices find the largest signal that was received, and the one
    found after the step before is looked at. So none waits for another on this account.

    Attributes:
      received: The signal that asked for the stop, if any did.
    """

    def __init__(
        self, own: StopSignals, mesh: Mesh, at: Callable[[int], object] = lambda _: None
    ):
        """Compiles nothing yet.

        Args:
          own: Signals to this process.
          mesh: Devices of all processes.
          at: Told each step that is done.
        """
        self.received: signal.Signals | None = None
        self._own, self._at = own, at
        self._before: Array | None = None
        self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        whole = NamedSharding(mesh, PartitionSpec())
        self._largest: Callable[[Array], Array] = jax.jit(jnp.max, out_shardings=whole)

    def __call__(self, step: int) -> bool:
        """Returns whether to stop after this step; all processes get the same answer.

        Args:
          step: Steps done.
        """
        self._at(step)
        own = np.full(jax.local_device_count(), self._own.received or 0, np.int32)
        received = jax.make_array_from_process_local_data(self._each, own)
        before, self._before = self._before, self._largest(received)
        if before is not None and int(before):
            self.received = signal.Signals(int(before))
        return self.received is not None
