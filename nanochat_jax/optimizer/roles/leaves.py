"""The leaves of a tree, with the words of their paths and their neighbours."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from nanochat_jax.optimizer.roles import names
from nanochat_jax.optimizer.roles.names import Words

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter: its path as given, the words of it in lower case, and its shape."""

    path: Any
    words: Words
    shape: Shape

    @property
    def name(self) -> str:
        """Last word."""
        return self.words[-1] if self.words else ""

    @property
    def module(self) -> Words:
        """All words but the last."""
        return self.words[:-1]

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def thick(self) -> int:
        """Number of axes with more than one entry."""
        return sum(size != 1 for size in self.shape)

    @property
    def unnamed(self) -> bool:
        """Whether it is a member of a sequence, or the only leaf."""
        return not self.words or self.name.isdigit()


class Leaves:
    """All leaves of a tree.

    Attributes:
      all: The leaves.
      below: For each module, the leaves at any depth in it.
    """

    def __init__(self, shapes: Mapping[Hashable, Shape]) -> None:
        words = names.words_of_tree(shapes)
        self.all = [Leaf(path, words[path], tuple(x)) for path, x in shapes.items()]
        self._remembered: dict[Any, Any] = {}
        self._by_words = {leaf.words: leaf for leaf in self.all}
        self._is_rwkv = any("receptance" in leaf.words for leaf in self.all)
        self.below: dict[Words, list[Leaf]] = defaultdict(list)
        for leaf in self.all:
            for depth in range(len(leaf.words)):
                self.below[leaf.words[:depth]].append(leaf)

    def get(self, *words: str) -> Leaf | None:
        """Returns the leaf of a path, if there is one."""
        return self._by_words.get(words)

    def remember(self, function: Callable[..., Any], words: Words) -> Any:
        """Returns a function of the leaves and of a module, worked out once."""
        key = (function, words)
        if key not in self._remembered:
            self._remembered[key] = function(self, words)
        return self._remembered[key]

    def bias_of(self, leaf: Leaf) -> Leaf | None:
        """Returns the bias that belongs to a matrix."""
        beside = (self.get(*leaf.module, name) for name in names.biases_of(leaf.name))
        return next((bias for bias in beside if bias), None)

    def is_vector(self, leaf: Leaf) -> bool:
        """Returns whether a leaf is a vector by its name or its neighbours' names."""
        if not leaf.words:
            return False
        if names.is_vector(leaf.words):
            return not self.lora_pair(leaf)
        if self._is_rwkv and names.is_vector_of_rwkv(leaf.words):
            return True
        if leaf.name == "g":  # of weight normalisation
            module = leaf.module
            return (*module, "v") in self._by_words or (*module, "layer") in self.below
        return self.is_gain(leaf)

    def lora_pair(self, leaf: Leaf) -> tuple[Leaf, ...]:
        """Returns both factors of LoRA if a leaf is one of them, or nothing."""
        below_lora = any("lora" in word for word in leaf.module[-1:])
        if not re.fullmatch("[ab]" if below_lora else r"(.*_)?lora_[ab]", leaf.name):
            return ()
        pair = [self.get(*leaf.module, leaf.name[:-1] + x) for x in "ab"]
        return tuple(x for x in pair if x) if all(pair) else ()

    def is_gain(self, leaf: Leaf) -> bool:
        """Returns whether a leaf is the gain or offset of a norm."""
        if len(leaf.words) < 2 or not names.is_norm(leaf.words[-2]):
            return False
        if not names.is_matrix(leaf.name):
            return names.is_vector(leaf.words)
        bias = self.bias_of(leaf)
        return leaf.name != "kernel" and (bias is None or bias.rank == leaf.rank)
