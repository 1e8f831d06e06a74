"""The weights of a run that are evaluated: its parameters, or an average of them."""

from collections.abc import Callable

import jax

from nanochat_jax.lm.model import Params
from nanochat_jax.lm.training.run import Run
from nanochat_jax.lm.training.step import TrainState
from nanochat_jax.transforms import averaged_weights


def read_out(run: Run) -> Callable[[TrainState], Params]:
    """Returns the function from a state to the weights that are evaluated.

    With `average_horizon` these are the average in part, `average_share`, and otherwise
    the parameters, in whose types they are. Before the average begins they are equal.

    Args:
      run: The run.
    """
    if run.config.average is None:
        return lambda state: state.params
    share = run.config.average_share

    @jax.jit
    def averaged(state: TrainState) -> Params:
        found = averaged_weights(run.tx, state.opt_state, state.params, share)
        return jax.tree.map(lambda x, p: x.astype(p.dtype), found, state.params)

    return averaged
