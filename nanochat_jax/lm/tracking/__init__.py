"""The numbers of a run while it trains: on the terminal, in files, in trackers.

console   progress on a terminal, one line per log interval elsewhere
jsonl     the metrics file of a run, `metrics.jsonl`
trackers  TensorBoard and Weights & Biases
"""

from nanochat_jax.lm.tracking.console import (
    Display as Display,
    clock as clock,
    make_display as make_display,
)
from nanochat_jax.lm.tracking.jsonl import (
    MetricsWriter as MetricsWriter,
    read_metrics as read_metrics,
)
from nanochat_jax.lm.tracking.trackers import (
    Sink as Sink,
    TensorBoardSink as TensorBoardSink,
    WandbSink as WandbSink,
)
