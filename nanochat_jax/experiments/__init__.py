"""TODO."""

from nanochat_jax.experiments import (
    figures as figures,
    results as results,
    speed as speed,
)
from nanochat_jax.experiments.trials import (
    Trial as Trial,
    plan_trials as plan_trials,
    read_results as read_results,
    run_trial as run_trial,
    write_json as write_json,
)
