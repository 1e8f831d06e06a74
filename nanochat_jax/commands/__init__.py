"""The commands of `nanochat-jax`, one a file: a dataclass of flags that can `run`."""
