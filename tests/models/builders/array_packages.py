"""Models whose trees hold names and arrays alone: penzai, haiku, Keras."""

import os

import jax
import jax.numpy as jnp

from builders.tree import Builders, Tree

os.environ.setdefault("KERAS_BACKEND", "jax")


def _penzai() -> Tree:
    from penzai import pz
    from penzai.models.transformer.variants import llamalike_common as llamalike

    config = llamalike.LlamalikeTransformerConfig(
        num_kv_heads=2, query_head_multiplier=2, embedding_dim=32, projection_dim=8,
        mlp_hidden_dim=48, num_decoder_blocks=2, vocab_size=64, mlp_variant="swiglu",
        tie_embedder_and_logits=False,
    )  # fmt: skip
    model = llamalike.build_llamalike_transformer(
        config, init_base_rng=jax.random.key(0), name="transformer"
    )
    _, variables = pz.unbind_params(model, freeze=True)
    return Tree({variable.label: variable.value for variable in variables})


def _haiku() -> Tree:
    import haiku as hk

    def block(x, name=None):
        y = hk.LayerNorm(-1, True, True)(x)
        y = hk.MultiHeadAttention(4, 4, w_init_scale=1.0, model_size=16)(y, y, y)
        return x + hk.Linear(16)(jax.nn.relu(hk.Linear(48)(y)))

    def images(image):
        image = hk.DepthwiseConv2D(1, 3)(hk.Conv2D(8, 3)(image))
        image = hk.BatchNorm(True, True, 0.9)(hk.Conv2DTranspose(4, 3)(image), True)
        return hk.Bias()(image).mean((1, 2))

    def model(tokens, image):
        x = hk.Embed(64, 16)(tokens)
        x = x + hk.get_parameter("pos_embs", (4, 16), init=jnp.zeros)
        for _ in range(2):
            x = hk.to_module(block)("bl")(x)
        x = hk.experimental.layer_stack(3)(hk.to_module(block)("stk"))(x)
        x = x[:, 0] + jnp.pad(images(image), [(0, 0), (0, 12)])
        x, _ = hk.GRU(16)(x, jnp.zeros((2, 16)))
        x, _ = hk.LSTM(16)(x, hk.LSTMState(jnp.zeros((2, 16)), jnp.zeros((2, 16))))
        return hk.Linear(64, name="logits")(x), hk.Linear(10, name="classifier")(x)

    init = hk.transform_with_state(model).init
    shapes = jax.eval_shape(
        init, jax.random.key(0), jnp.zeros((2, 4), int), jnp.zeros((2, 8, 8, 3))
    )
    return Tree(shapes[0])


def _keras_model():
    import keras

    tokens = keras.Input((8,), dtype="int32")
    x = keras.layers.Embedding(64, 16, name="tok")(tokens)
    x = x + keras.layers.MultiHeadAttention(4, 4, name="multi_head_attention")(x, x)
    x = keras.layers.LayerNormalization(name="layer_normalization")(x)
    x = keras.layers.Dense(48, activation="relu", name="dense")(x)
    x = keras.layers.Dense(16, name="dense_1")(x)
    x = keras.layers.LSTM(16, return_sequences=True, name="lstm")(x)
    return keras.Model(tokens, keras.layers.Dense(64, name="lm_head")(x))


def _keras_images():
    import keras

    image = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(8, 3, name="conv2d")(image)
    x = keras.layers.DepthwiseConv2D(3, name="depthwise_conv2d")(x)
    x = keras.layers.SeparableConv2D(8, 3, name="separable_conv2d")(x)
    x = keras.layers.Conv2DTranspose(4, 3, name="conv2d_transpose")(x)
    x = keras.layers.BatchNormalization(name="batch_normalization")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Reshape((1, 4))(x)
    x = keras.layers.GRU(6, name="gru")(x)
    x = keras.layers.EinsumDense("ab,bcd->acd", (2, 5), bias_axes="cd", name="heads")(x)
    x = keras.layers.Flatten()(x)
    return keras.Model(image, keras.layers.Dense(10, name="classifier")(x))


def _by_path(model) -> Tree:
    """Returns the trained variables in the nested dict that their paths make."""
    params: dict = {}
    for variable in model.trainable_variables:
        *folders, name = variable.path.split("/")
        place = params
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = variable.value
    return Tree(params)


def _keras_list() -> Tree:
    model = _keras_model()
    return Tree([variable.value for variable in model.trainable_variables], model)


BUILDERS: Builders = {
    "penzai llamalike": _penzai,
    "dm-haiku": _haiku,
    "keras by path": lambda: _by_path(_keras_model()),
    "keras images by path": lambda: _by_path(_keras_images()),
    "keras list": _keras_list,
}
