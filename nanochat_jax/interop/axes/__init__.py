"""Matrix axes of parameters, as the modules of JAX's frameworks declare them.

modules     `matrix_axes(model)`, which chooses the reader of a framework
declared    `Place`, a field of a module, and `Declared`, its declaration
requests    gates, heads and parts that are to be a batch
settle      from declarations to the axes of leaves, or a refusal
stacks      the stacked axes that `vmap` and `scan` add
trees       modules within pytrees, and the fields that leaves belong to
equinox     rules for the classes of Equinox
haliax      rules for the classes of Haliax
keras       rules for the layers of Keras
nnx         rules for the modules of Flax NNX and of models made of them
linen       rules for the modules of Flax linen
linen_init  abstract calls of linen modules
"""

from nanochat_jax.interop.axes.modules import (
    in_tree as in_tree,
    matrix_axes as matrix_axes,
)
