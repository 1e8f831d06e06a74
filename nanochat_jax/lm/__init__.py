"""A GPT and its trainer, built on the transforms (extra `train`), in eight rooms.

Each room may import from itself and from the rooms above it in this list:

runtime      the process and its machine
model        the GPT, its loss and sampling, its shardings on a mesh
data         from text to batches of token ids
huggingface  folders of `transformers`, read and written
checkpoints  states on disk, trained models, exported weights
tracking     the numbers of a run on the terminal, in files, in trackers
training     the compiled step, the loop around it, evaluation, resumption
planning     memory, operations and traffic of a run, before it is run
"""
