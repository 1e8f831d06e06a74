"""Published ways to orthogonalise, each with its source: polynomials and fractions.

A step of polynomials maps every singular value `s` to `a s + b s³ + c s⁵`, in two
products of matrices if `c` is 0 and else in three. The bands of a sequence of steps
hold for singular values up to one, so the input is divided by its Frobenius norm, times
a margin where a sequence grows fast beyond one, or rescaled row by row. Fractions have
one step, with an inverse for each of them.
"""

import dataclasses
from typing import Literal

Coefficients = tuple[float, float, float]
Rescaling = Literal["frobenius", "aol"]


@dataclasses.dataclass(frozen=True)
class Polynomials:
    """A sequence of polynomials and the scaling of the input it is meant for.

    Attributes:
      coefficients: One `(a, b, c)` for each step.
      margin: Factor on the Frobenius norm that the input is divided by.
      rescaling: `"frobenius"`, or `"aol"` for the almost-orthogonal scaling of Gram
        rows, which bounds singular values more tightly.
      repeats: Whether the last polynomial may be repeated for further steps.
    """

    coefficients: tuple[Coefficients, ...]
    margin: float = 1.0
    rescaling: Rescaling = "frobenius"
    repeats: bool = False

    def take(self, steps: int) -> "Polynomials":
        """Returns the sequence with that many steps.

        Raises:
          ValueError: If there are fewer and the last may not be repeated.
        """
        have = len(self.coefficients)
        if steps < 1 or (steps > have and not self.repeats):
            most = "" if self.repeats else f" and at most {have}"
            raise ValueError(
                f"this sequence takes at least 1{most} steps, got {steps}. Choose "
                "another number of steps or another sequence."
            )
        more = self.coefficients[-1:] * max(steps - have, 0)
        taken = (*self.coefficients[:steps], *more)
        return dataclasses.replace(self, coefficients=taken)


def _with_safety(raw: tuple[Coefficients, ...], s: float) -> tuple[Coefficients, ...]:
    """Returns polynomials of `x / s`, so that values up to `s` stay in range."""
    return tuple((a / s, b / s**3, c / s**5) for a, b, c in raw)


# Amsel et al. (2025), "The Polar Express", as its authors' code computes them.
_POLAR_EXPRESS_RAW = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)

POLYNOMIALS: dict[str, Polynomials] = {
    # Jordan (2024), Muon. Five steps take [0.01, 1] into [0.68, 1.14].
    "quintic": Polynomials(((3.4445, -4.7750, 2.0315),) * 5, repeats=True),
    # You (2024), tuned step by step; five take [0.01, 1] into [0.97, 1.04].
    "you": Polynomials(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        )
    ),
    # Polar Express optimised for five steps with safety factor 0.02 and cushion 2.
    "polar_express_5": Polynomials(
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        margin=1.02,
    ),
    # Polar Express in full, with safety factor 1.01 on all steps but the last, which
    # may be repeated: eight steps take [1e-3, 1] to one.
    "polar_express_8": Polynomials(
        (*_with_safety(_POLAR_EXPRESS_RAW, 1.01), (1.875, -1.25, 0.375)), repeats=True
    ),
    # Boissin et al. (2025), "Turbo-Muon", as corrected: the list first published is
    # for another normalisation and turns large singular values around.
    "aol": Polynomials(
        (
            (4.6051, -9.6552, 5.6769),
            (4.7505, -6.0861, 2.1790),
            (2.7763, -2.3190, 0.5523),
            (2.4231, -2.2861, 0.8193),
        ),
        rescaling="aol",
    ),
    # Grishina et al. (2025), "Chebyshev-optimised Newton-Schulz". Beyond one it grows
    # at once, so rounding alone would break it without a margin.
    "cans": Polynomials(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        margin=1.02,
    ),
    # "How much orthogonalization does Muon need?" (2026), arXiv:2606.00371. Without the
    # fifth power a step takes two products, not three; five take [0.01, 1] into [0.77,
    # 1.30]. The first turns values over 1.0035 around, so rounding alone would break it
    # without a margin.
    "cubic": Polynomials(
        (
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        ),
        margin=1.02,
    ),
    # DeepSeek-V4 (2026): eight steps of the quintic, and two that converge; all ten
    # take [1e-3, 1] into [1, 1.001].
    "deepseek_v4": Polynomials(
        ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2, repeats=True
    ),
}
"""Polynomials by name."""

QUINTIC = POLYNOMIALS["quintic"]
"""Jordan's quintic with five steps, the default."""


@dataclasses.dataclass(frozen=True)
class Fractions:
    """Partial fractions, `s (constant + Σ weight / (s² + shift))` of a singular value.

    Attributes:
      constant: Value where `s` is large.
      terms: A `(weight, shift)` for each pole.
    """

    constant: float
    terms: tuple[tuple[float, float], ...]


# Zolotarev's best odd rational functions of degree 5, 7 and 9 for one, as Nakatsukasa
# and Freund (2016), "Computing fundamental matrix decompositions accurately via the
# matrix sign function in two iterations", sections 3 and 4, have them; scaled to err as
# far up as down. They take [0.003, 1] into [0.87, 1.13], [0.005, 1] into [0.977, 1.023]
# and [0.007, 1] into [0.996, 1.004]. A wider interval would have a smaller least shift,
# which float32 cannot invert safely.
ZOLOTAREV: dict[int, Fractions] = {
    2: Fractions(
        0.9123147825649032,
        (
            (0.012190644006966535, 3.563632249013658e-05),
            (0.20721783453362386, 0.012726403624327115),
        ),
    ),
    3: Fractions(
        0.6078608569617533,
        (
            (0.009067540914998923, 3.062850632108433e-05),
            (0.053577883336908695, 0.001913529952543826),
            (0.3846978038644245, 0.091696110401892),
        ),
    ),
    4: Fractions(
        0.44904214267760506,
        (
            (0.007916517838135923, 2.870012739897457e-05),
            (0.026478845385536, 0.0008195765524173132),
            (0.10814684476593175, 0.014248143968358202),
            (0.5249445416922031, 0.26915320022242256),
        ),
    ),
}
"""Fractions by the number of their poles."""

FLOAT32_METHODS = ("zolotarev",)
"""Names of the methods that need float32."""

METHODS = (*POLYNOMIALS, *FLOAT32_METHODS)
"""Names of all methods."""

Method = Polynomials | Fractions


def default_steps(name: str) -> int:
    """Returns the steps, or poles, that a method has by itself; 1 if there is none."""
    if name in FLOAT32_METHODS:
        return min(ZOLOTAREV)
    return len(POLYNOMIALS[name].coefficients) if name in POLYNOMIALS else 1


def method_of(name: str, steps: int) -> Method:
    """Returns a method by its name.

    Args:
      name: One of `METHODS`.
      steps: Steps of polynomials, or poles of fractions.

    Raises:
      ValueError: If there is none of that name, or not with so many steps.
    """
    if name not in METHODS:
        raise ValueError(f"`ns_method` must be one of {[*METHODS]}, got {name!r}.")
    if name in FLOAT32_METHODS:
        if steps in ZOLOTAREV:
            return ZOLOTAREV[steps]
        wanted = f"one of {[*ZOLOTAREV]}, the poles it may have,"
    else:
        known, most = POLYNOMIALS[name], default_steps(name)
        if known.repeats or steps <= most:
            return known.take(steps)
        wanted = f"at most {most}"
    raise ValueError(f"`ns_steps` must be {wanted} for {name!r}, got {steps}.")
