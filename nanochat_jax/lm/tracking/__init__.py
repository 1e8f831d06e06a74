"""The numbers of a run while it trains: on the terminal, in files, in trackers.

chart     losses and bytes of a run as text
console   progress on a terminal, one line per log interval elsewhere
jsonl     the metrics file of a run, `metrics.jsonl`
trackers  TensorBoard and Weights & Biases
"""

from nanochat_jax.lm.tracking import chart as chart
from nanochat_jax.lm.tracking.console import (
    Display as Display,
    busy as busy,
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
    make_sinks as make_sinks,
)
