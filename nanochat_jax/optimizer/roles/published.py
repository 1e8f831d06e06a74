"""Layouts of published models: leaves that belong together, and their axes.

A letter is an axis; the same letter in two leaves is the same size. `DHK D->HK` is a
kernel `[features, heads, head_dim]` that sums over its features.
"""

from collections.abc import Mapping
from typing import NamedTuple

IN_OUT = ("kernel", "w", "weights", "")
OUT_IN = ("weight",)

# The same with input and output exchanged would fit the sizes as well.
EITHER_WAY = ("plain attention", "maps up and down")


class Family(NamedTuple):
    """Leaves that belong together.

    Attributes:
      children: Names of the children of a module, by the part they play.
      endings: Names of the leaves of a child; empty for the child itself.
      layouts: Layouts of the parts, by name.
      needed: Groups of parts; without one of each the names say too little.
    """

    children: Mapping[str, tuple[str, ...]]
    endings: tuple[str, ...]
    layouts: Mapping[str, Mapping[str, str]]
    needed: tuple[tuple[str, ...], ...] = ()


_ATTENTION = {
    "query": (
        "query", "q_proj", "query_proj", "query_projection", "to_q", "wq", "q",
        "receptance",
    ),
    "key": ("key", "k_proj", "key_proj", "key_projection", "to_k", "wk", "k"),
    "value": ("value", "v_proj", "value_proj", "value_projection", "to_v", "wv", "v"),
    "out": (
        "out", "o_proj", "out_proj", "output", "output_proj", "attention_output",
        "to_out", "wo", "o",
    ),
}  # fmt: skip
_MLP = {
    "up": (
        "up_proj", "gate_proj", "wi", "wi_0", "wi_1", "w1", "w3", "fc1",
        "c_fc", "fc_in", "dense1", "dense_in", "linear_in", "gating_linear",
        "value_linear",
    ),
    "down": (
        "down_proj", "w2", "fc2", "c_proj", "fc_out", "dense2",
        "dense_out", "linear_out", "out_linear", "wo",
    ),
}  # fmt: skip
_MLP_BIASES = {"up bias": "F", "down bias": "O"}
_EINSUMS = {
    name: (name,) for name in ("q_einsum", "kv_einsum", "qkv_einsum", "attn_vec_einsum")
}

FAMILIES = (
    Family(
        _ATTENTION,
        IN_OUT,
        {
            "attention with axes for heads": {
                "query": "DHK D->HK",
                "key": "EGK E->GK",
                "value": "FGV F->GV",
                "out": "HVO HV->O",
                "query bias": "HK",
                "key bias": "GK",
                "value bias": "GV",
                "out bias": "O",
            },
            "attention with axes for heads, merged before the output": {
                "query": "DHK D->HK",
                "key": "EGK E->GK",
                "value": "FGV F->GV",
                "out": "PO P->O",
                "query bias": "HK",
                "key bias": "GK",
                "value bias": "GV",
                "out bias": "O",
            },
            "attention with axes for groups of heads": {
                "query": "DGQK D->GQK",
                "key": "DGK D->GK",
                "value": "DGV D->GV",
                "out": "GQVO GQV->O",
            },
            "plain attention": {
                "query": "DP D->P",
                "key": "EQ E->Q",
                "value": "FR F->R",
                "out": "PO P->O",
                "query bias": "P",
                "key bias": "Q",
                "value bias": "R",
                "out bias": "O",
            },
        },
        (("query", "key", "value"),),
    ),
    Family(
        _ATTENTION,
        OUT_IN,
        {
            "attention with axes for heads": {
                "query": "HKD D->HK",
                "key": "GKE E->GK",
                "value": "GVF F->GV",
                "out": "OHV HV->O",
                "query bias": "HK",
                "key bias": "GK",
                "value bias": "GV",
                "out bias": "O",
            },
            "attention with axes for groups of heads": {
                "query": "GQKD D->GQK",
                "key": "GKD D->GK",
                "value": "GVD D->GV",
                "out": "OHV HV->O",
                "query bias": "GQK",
                "key bias": "GK",
                "value bias": "GV",
                "out bias": "O",
            },
            "plain attention": {
                "query": "PD D->P",
                "key": "QE E->Q",
                "value": "RF F->R",
                "out": "OP P->O",
                "query bias": "P",
                "key bias": "Q",
                "value bias": "R",
                "out bias": "O",
            },
        },
        (("query", "key", "value"),),
    ),
    Family(
        _EINSUMS,
        ("w", "kernel", ""),
        {
            "einsums of Gemma": {
                "q_einsum": "HDK D->HK",
                "kv_einsum": "2GDK D->GK",
                "qkv_einsum": "3HDK D->HK",
                "attn_vec_einsum": "HKD HK->D",
            }
        },
    ),
    Family(
        {"gating": ("gating_einsum",), "linear": ("linear",)},
        ("", "w", "kernel"),
        {
            "gates [2, features, hidden]": {
                "gating": "2DF D->F",
                "linear": "FD F->D",
            },
            "gates [2, hidden, features]": {
                "gating": "2FD D->F",
                "linear": "FD F->D",
            },
        },
        (("gating",),),
    ),
    Family(
        {"up": ("up", "gate"), "down": ("down",)},
        IN_OUT,
        {
            "maps up and down": {"up": "DF D->F", "down": "FO F->O", **_MLP_BIASES},
            # Networks that sample up and down have these names too.
            "convolutions over one axis": {
                "up": "XDF XD->F",
                "down": "YEO YE->O",
                **_MLP_BIASES,
            },
            "convolutions over two axes": {
                "up": "XYDF XYD->F",
                "down": "ZWEO ZWE->O",
                **_MLP_BIASES,
            },
        },
        (("up",), ("down",)),
    ),
    Family(
        _MLP,
        IN_OUT,
        {
            "maps up and down": {
                "up": "DF D->F",
                "down": "FO F->O",
                **_MLP_BIASES,
            }
        },
        (("up",), ("down",)),
    ),
    Family(
        _MLP,
        OUT_IN,
        {
            "maps up and down (out, in)": {
                "up": "FD D->F",
                "down": "OF F->O",
                **_MLP_BIASES,
            }
        },
        (("up",), ("down",)),
    ),
)
