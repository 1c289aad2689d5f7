"""Floating point operations that the parts of a conversion need at least: the arithmetic floor.

One place for the formulas; `work` foretells with them, a profile holds what was done against them. A
multiplication and the addition after it are two operations. Counted is what grows with the cube of a size:
norms, activations, searches for scales and all that moves data is time over the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from exlq.types import LinearSpec

Share = Callable[[LinearSpec], float]


def forward(weights: float, tokens: int) -> float:
    """Tokens through linears of so many weights: each weight is multiplied and added once a token."""
    return 2.0 * weights * tokens


def attention(width: int, rows: int, length: int) -> float:
    """Causal attention of rows of `length` tokens, `width` = heads × their size.

    Scores and their sums over values are two products of 2 · width operations for each pair of tokens; of
    the length² pairs of a row, length (length + 1) / 2 are not masked. A sliding window leaves fewer.
    """
    return 2.0 * width * rows * length * (length + 1)


def block(linears: Iterable[LinearSpec], rows: int, length: int, share: Share = lambda spec: 1.0) -> float:
    """One decoder block forward. The width of its attention is what o_proj receives.

    Args:
        share: the part of all tokens that reaches a linear: less than all of an expert's.
    """
    specs = list(linears)
    width = sum(spec.in_features for spec in specs if spec.key.endswith(".o_proj"))
    weights = sum(spec.numel * share(spec) for spec in specs)
    return forward(weights, rows * length) + attention(width, rows, length)


def block_backward(
    linears: Iterable[LinearSpec], rows: int, length: int, share: Share = lambda spec: 1.0
) -> float:
    """A block forward again and back, to the gradients of its inputs but of no weight.

    Back, each linear is one more product of the forward's size; of attention, each of its two products has
    two, the gradients of both its factors.
    """
    specs = list(linears)
    there = block(specs, rows, length, share)
    linear = forward(sum(spec.numel * share(spec) for spec in specs), rows * length)
    return 2 * there + (there - linear)


def second_moment(size: int, tokens: float) -> float:
    """The sum of x xᵀ over tokens, a Hessian's among others: symmetric, so half of 2 · size² · tokens."""
    return float(size) ** 2 * tokens


def cross_moment(size: int, other: int, tokens: float) -> float:
    """The sum of x yᵀ over tokens, which has no symmetry: drift."""
    return 2.0 * size * other * tokens


def factor(size: int) -> float:
    """A Cholesky factorization: Σ c² over columns c, the inner products of what lies left of the diagonal."""
    return float(size) ** 3 / 3


def sweep(size: int, rows: int, options: int = 1) -> float:
    """Rounding with feedback: column c takes over the errors of the c before it, 2 c operations a row."""
    return float(size) ** 2 * rows * options


def factored_energies(size: int, vectors: int) -> float:
    """vᵀHv by H's triangular factor: as a sweep, one product with a triangle."""
    return float(size) ** 2 * vectors


def energies(size: int, vectors: int) -> float:
    """vᵀHv by a Hessian that has no factor: one whole product."""
    return 2.0 * float(size) ** 2 * vectors


def trials(size: int, rows: int, judged: int, options: int) -> float:
    """Options swept over `rows` rows, the errors of `judged` of them weighed under the held-out Hessian."""
    return sweep(size, rows, options) + energies(size, judged * options)


def descent(size: int, rows: int, walks: int, options: int = 1) -> float:
    """Descent after a sweep: H times the errors at its begin, H times what a walk has changed after each."""
    return 2.0 * float(size) ** 2 * rows * options * (1 + walks)


def correction(size: int, rows: int) -> float:
    """W C (H + ridge·I)⁻¹ of `rows` output rows: one whole product and two with triangles, solved."""
    return 2.0 * float(size) ** 2 * rows + 2 * float(size) ** 2 * rows
