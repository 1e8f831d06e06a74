"""Comparisons of optimizers: trials, their speed, and their results.

figures  figures of runs and comparisons, drawn with matplotlib
labels   names beside what they name in a figure
results  mean and standard deviation over seeds, as JSON and as a table
speed    tokens per second of several runs that take turns in one process
trials   the training of variants with several seeds, with one result file each
"""

from nanochat_jax.experiments import (
    figures as figures,
    results as results,
    speed as speed,
)
from nanochat_jax.experiments.trials import (
    Trial as Trial,
    check_folder as check_folder,
    plan_trials as plan_trials,
    read_results as read_results,
    run_trial as run_trial,
    write_json as write_json,
)
