"""A GPT in Flax and its trainer, built on the transforms (extra `train`)."""
