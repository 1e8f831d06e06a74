"""Rules for the names on the path of a parameter.

A path is split into words in one place, whatever kinds of keys it has; all rules about
names look at words.
"""

import re
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any

Words = tuple[str, ...]

# Nodes that only wrap the array, in Flax, penzai and Haliax.
_WRAPPERS = ("value", "raw_value", "data_array", "array")

_VECTOR = re.compile(
    r"(.*_)?(bias|biases|scale|gain|gamma|beta|offset)\d*|bias_.*|.*_bias_table"
    r"|b\d*|b_\w{1,2}|.*_log|lambda_\w+|negative_slope|weight_g"
)
_RWKV_VECTOR = re.compile(
    r"x_\w|[wavkrg]0|k_k|k_a|r_k|time_(mix_\w+|maa_[a-z]|decay|first|faaaa)"
)
_NORM = re.compile(
    r"(.*norm|norm(alization)?|ln|rms|bn|gn|(batch|layer)normalization)\d*"
)
_TABLE = re.compile(
    r"(?!un).*(embed|embeds|embedding|embeddings|embedder)\d*|embs?|wte|wpe"
)
_TOKEN = re.compile(
    r"cls|(cls|class|reg|register|mask|dist|distillation|query)_tokens?"
    r"|pos(itional)?_enc(oding)?s?|rel_pos(_[hw])?|w_e|w_pos"
)
# Tables of published PyTorch models.
_TABLE_MODULE = {"relative_attention_bias", "shared"}
# Words by which a module named after embeddings is a linear map.
_MAP = {
    "conv", "dense", "kernel", "linear", "mlp", "patch", "patches", "patchifier",
    "proj", "projection",
}  # fmt: skip
_HEAD = {
    "classification_head", "classifier", "classifier_head", "cls_head", "head",
    "lm_head", "logits", "logits_dense", "mlm_head", "output_head",
    "prediction_head", "unembed", "unembedding",
}  # fmt: skip
_SOME_HEAD = re.compile(
    r"(?!(multi|attn|attention|per|num|talking)_).*_head(_\d+)?|lm_?head\w*"
    r"|(?!pre_)\w+_logits|logits_\w+|embed_out|output_layer|qa_outputs|readout"
)
_WEAK_HEAD = {"decoder", "out", "output", "output_projection", "outputs"}
_INNER = re.compile(
    r".*(attention|attn|mlp|ffn|feed_forward|feedforward|mixer|moe).*|att|ff|mha"
)
_STACK = re.compile(r"(.*_)?(blocks?|convs|experts?|layers?|scan|stack|vmap).*|h|body")
_MATRIX = re.compile(r"(.*_)?(kernel|weights?)\d*|weight_.*|w\d*|w_\w{1,2}")


def words(path: Any) -> Words:
    """Splits a path into words, whatever kinds of keys it has.

    Keys of dictionaries, attributes and sequences, keys that are tuples, and names with
    dots or slashes all count.

    Example:
      >>> import jax
      >>> words("model.layers.0.self_attn.q_proj.weight")
      ('model', 'layers', '0', 'self_attn', 'q_proj', 'weight')
      >>> words((jax.tree_util.GetAttrKey("up"), jax.tree_util.DictKey("kernel")))
      ('up', 'kernel')

    Args:
      path: Path as JAX has it, or a name.

    Returns:
      The words, in their own case.
    """
    keys = (path,) if isinstance(path, str) else tuple(path)
    return tuple(word for key in keys for word in _split(_name(key)))


def words_of_tree(paths: Iterable[Hashable]) -> dict[Any, Words]:
    """Splits all paths of a tree, in lower case and without wrappers of the array.

    A last word such as `value`, or an index, is left out where nothing stands beside
    it, as in `weight/0`; a `value` beside a `query` is a name.

    Args:
      paths: Paths as JAX has them, or names.

    Returns:
      The words of each path.
    """
    split = {path: tuple(word.lower() for word in words(path)) for path in paths}
    children = Counter(found[:-1] for found in split.values())

    def trimmed(found: Words) -> Words:
        *module, name = found or ("",)
        alone = bool(module) and children[tuple(module)] == 1
        wraps = alone and (name in _WRAPPERS or name.isdigit())
        if wraps and not module[-1].isdigit():
            *module, name = module
        # As penzai has gains: `norm/scale.weights`.
        if name == "weights" and is_vector(tuple(module)):
            *module, name = module
        return (*module, name) if found else found

    return {path: trimmed(found) for path, found in split.items()}


def is_vector(leaf: Words) -> bool:
    """Returns whether a leaf is a bias, gain or the like by its name."""
    return bool(_VECTOR.fullmatch(_last(leaf)))


def is_vector_of_rwkv(leaf: Words) -> bool:
    """Returns whether a leaf of an RWKV model is a vector by its name."""
    return bool(_RWKV_VECTOR.fullmatch(_last(leaf)))


def is_norm(word: str) -> bool:
    """Returns whether a module is named like a norm, as `ln_1`, `q_norm`."""
    parts = [part for part in _parts(word) if not part.isdigit()]
    other = word in ("weight_norm", "spectral_norm") or bool(_MAP & {*parts[-1:]})
    return not other and any(_NORM.fullmatch(part) for part in parts)


def is_table(leaf: Words) -> bool:
    """Returns whether a leaf is an embedding by its name or the name of its module.

    A `kernel` never is, nor is the weight of a projection or convolution.
    """
    *_, module, name = ("", *leaf)
    if _TOKEN.fullmatch(name):
        return True
    if name == "kernel" or _MAP & {*_parts(name)} or re.fullmatch(r"w\d+", name):
        return False
    return module in _TABLE_MODULE or _names_table(name) or _names_table(module)


def is_head(word: str) -> bool:
    """Returns whether a word names an output layer wherever it stands."""
    return word in _HEAD or bool(_SOME_HEAD.fullmatch(word))


def is_weak_head(word: str) -> bool:
    """Returns whether a word names an output layer at the top of a model only."""
    return word in _WEAK_HEAD


def is_inner(word: str) -> bool:
    """Returns whether a word names a part of a block, such as attention."""
    return bool(_INNER.fullmatch(word))


def is_stack(word: str) -> bool:
    """Returns whether a word names what may be a stack of layers."""
    return bool(_STACK.fullmatch(word)) or word.isdigit()


def is_block(word: str) -> bool:
    """Returns whether a word names one block among others, as `block_3`, `7`."""
    return is_stack(word) or bool(re.fullmatch(r".*_\d+", word))


def is_out_in(name: str) -> bool:
    """Returns whether a leaf is `(out, in)` by its name, as in PyTorch and Equinox."""
    return bool(
        re.fullmatch(r"(.*_)?weight|weight_[a-z]+(_l\d+)?(_reverse)?|original\d?", name)
    )


def is_matrix(name: str) -> bool:
    """Returns whether a leaf is named like the matrix of a linear map."""
    return bool(_MATRIX.fullmatch(name))


def is_conv(words: Words) -> bool:
    """Returns whether a module is a convolution by its name, and not transposed."""
    return "conv" in _last(words) and not is_transposed(words)


def is_conv_for_sure(words: Words) -> bool:
    """Returns whether a module is named like nothing but a convolution."""
    return bool(re.fullmatch(r"conv_\d+|(.*_)?conv1_?d(_\d+)?", _last(words)))


def is_transposed(words: Words) -> bool:
    """Returns whether a module is named like a transposed convolution."""
    return any(
        re.search(r"deconv|conv.*trans|trans.*conv", word) for word in words[-1:]
    )


def is_dense(words: Words) -> bool:
    """Returns whether a module is a layer of one input and one output axis."""
    return bool(re.fullmatch(r"(dense|linear)_\d+", _last(words)))


def biases_of(name: str) -> tuple[str, ...]:
    """Returns the names that the bias of a leaf can have."""
    if re.fullmatch(r"kernel|weights?|w", name):
        return ("bias", "b", "biases")
    number = re.fullmatch(r"w_?(\w{1,2})", name)
    if number:
        return (f"b{number[1]}", f"b_{number[1]}", f"bias{number[1]}")
    return (re.sub(r"(kernel|weight)", "bias", name),) if is_matrix(name) else ()


def _last(leaf: Words) -> str:
    return leaf[-1] if leaf else ""


def _name(key: Any) -> Any:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key


def _split(name: Any) -> list[str]:
    if isinstance(name, tuple):
        return [word for part in name for word in _split(part)]
    return [word for word in re.split(r"[/.]", str(name)) if word]


def _parts(word: str) -> list[str]:
    return [part for part in word.split("_") if part]


def _names_table(word: str) -> bool:
    parts = _parts(word)
    return any(map(_TABLE.fullmatch, parts)) and not _MAP & {*parts}
