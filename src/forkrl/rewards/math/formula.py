"""Formulas as sympy expressions, parsed by latex2sympy, size-checked before any evaluation, and compared by value.

Constants must agree to forty digits beyond the leading one, other formulas at three points. ``simplify`` is not used:
its running time is unbounded. math-verify's ``verify`` decides where no value can be computed (sets).
"""

from __future__ import annotations

import logging
import math
import re
import zlib
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import sympy
from latex2sympy2_extended import latex2sympy
from math_verify import verify
from sympy.core.function import AppliedUndef

from forkrl.rewards.math.numbers import Number, is_close
from forkrl.rewards.math.units import TRIGONOMETRY

_MAX_TEXT = 400
_MAX_DEPTH = 20
_MAX_NODES = 400
_MAX_DIGITS = 4_000
"""Python does not print integers with more than 4,300 digits."""
_MAX_DIGITS_OF_FUNCTION = 20_000
"""At the points where functions are compared."""
_MAX_ROOT_DIGITS = 1_000
_MAX_BINOMIAL = 10_000
_MAX_TERMS = 100

_REFUSED = [
    (re.compile(pattern, re.DOTALL), reason)
    for pattern, reason in (
        (
            r"\\(?:sum|int|iint|oint|prod|lim|gcd|lcm|def|newcommand|input|include|write|csname|loop)(?![a-z])",
            "a sum, integral or limit is not a final answer",
        ),
        (r"(?:_\s*\{[^{}_]*){3}_", "subscripts of subscripts"),  # each level doubles the parser's time
        # The parser evaluates binomial coefficients and gamma functions while parsing.
        (r"\\Gamma(?![a-z]).*\\Gamma(?![a-z])", "a gamma function of gamma functions"),
    )
]
_BINOMIAL = re.compile(r"\\[dt]?binom|\\choose|\\Gamma(?![a-z])")
_NUMERAL = re.compile(r"\d+")
_PRODUCT = re.compile(r"((?<![_\d.])\d+(?:\.\d+)?|\))\s*(?=\()|\)\s*(?=\\frac)")
_PRODUCT_WITH_FRACTION = re.compile(r"(?<![_^\d])(\d+)\s*(\\frac\{(\d+)\}\{(\d+)\})")
_NUMBERS_SIDE_BY_SIDE = re.compile(r"(?<![_^\d])\d+(?:\s+|\s*\\?[{\[]\s*)\d")
_POINT_WITHOUT_PLACES = re.compile(r"(?<=\d)\.(?!\d)")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\\circ")
_POINTS = (1, -1, 2)
_POSITIVE_POINTS = (1, 2, Fraction(3, 2))
_LOG10_OF_VARIABLE = 0.72
"""An upper bound: ``_at`` uses values up to 5.2, and named constants are smaller."""
_DIGITS = 30

# Its only warning is that timeouts are off, which is intended.
logging.getLogger("math_verify").setLevel(logging.ERROR)


class TooLarge(ValueError):
    """A size bound is exceeded: evaluation could take too long, and no real final answer is that large."""


class Formula(NamedTuple):
    """An expression with exact numbers, and whether it was written with decimal fractions and with |...|."""

    expression: Any
    is_decimal: bool
    has_bars: bool = False

    def __str__(self) -> str:
        """Expanded if that is cheap, so that equal answers mostly have equal text."""
        is_cheap = isinstance(self.expression, sympy.Expr) and _terms(self.expression) <= _MAX_TERMS
        return str(sympy.expand(self.expression) if is_cheap else self.expression)

    def renamed(self, old: str, new: str) -> Formula:
        names = {symbol: sympy.Symbol(new, real=True) for symbol in self.expression.free_symbols if symbol.name == old}
        return self._replace(expression=self.expression.xreplace(names))


@lru_cache(maxsize=512)
def read_formula(text: str) -> Formula | Number | None:
    """Parse ``plain_notation`` (Number if rational); None if not mathematics or without a value. May raise TooLarge."""
    _refuse_large_text(text)
    if TRIGONOMETRY.search(text):
        text = _DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)
    if _NUMBERS_SIDE_BY_SIDE.search(text):
        return None
    text = _with_products(_POINT_WITHOUT_PLACES.sub("", text))
    try:
        expression = latex2sympy(text, is_real=True, convert_degrees=False, normalization_config=None)
    except MemoryError:
        raise
    except RecursionError:
        raise TooLarge("deeper than the reader can follow") from None
    except Exception:  # the parser and sympy raise many types, including bare Exception
        return None
    if isinstance(expression, list) or not isinstance(expression, sympy.Basic | sympy.MatrixBase):
        return None
    _refuse_large_value(expression)
    value = _exact(expression)
    return value._replace(has_bars="|" in text) if isinstance(value, Formula) else value


def same_formula(gold: Formula | Number, found: Formula | Number) -> bool:
    """Whether both have the same value for all values of their variables."""
    gold, found = _as_formula(gold), _as_formula(found)
    a, b, is_decimal = gold.expression, found.expression, gold.is_decimal or found.is_decimal
    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        return _same_matrix(gold, found)
    if not isinstance(a, sympy.Expr) or not isinstance(b, sympy.Expr):
        return bool(verify(a, b, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True))
    if names_of(gold) != names_of(found):
        return False
    if not names_of(gold):
        return _same_constant(a, b, is_decimal)
    tolerance = 6 if is_decimal else 40
    agree = [_agree_at(a, b, point, tolerance) for point in _POINTS]
    if agree.count(None) > 1:
        return bool(verify(a, b, timeout_seconds=None, raise_on_error=True))
    if False not in agree:
        return True
    # Roots and logarithms have several branches at negative variables: sqrt(xy) and sqrt(x)sqrt(y).
    if gold.has_bars or found.has_bars or not (_has_branches(a) or _has_branches(b)):
        return False
    return all(_agree_at(a, b, point, tolerance) for point in _POSITIVE_POINTS)


def _agree_at(a: Any, b: Any, point: int | Fraction, tolerance: int) -> bool | None:
    """Whether two formulas have the same value at a point; None if one has none there."""
    # Evaluate the gap as one formula, so that x and 2x still differ next to 10^20.
    gap = _at(sympy.Add(a, sympy.Mul(-1, b)), point)
    sizes = (gap, _at(a, point), _at(b, point))
    if None in sizes:
        return None
    return bool(gap == 0) if gap.is_Rational and tolerance > 6 else _is_within(*sizes, tolerance)


def _has_branches(expression: Any) -> bool:
    powers = expression.atoms(sympy.Pow)  # also |x|, as sympy writes sqrt(x^2)
    return expression.has(sympy.log, sympy.Abs) or any(p.base.free_symbols and not p.exp.is_integer for p in powers)


def is_multiple(gold: Formula | None, found: Formula | None, *, positive: bool) -> bool:
    """Whether one is a (positive) multiple of the other, so that both have the same zeros (signs)."""
    if gold is None or found is None or names_of(gold) != names_of(found):
        return False
    values = [(_at(gold.expression, point), _at(found.expression, point)) for point in _POINTS]
    ratios = [left / right for left, right in values if left and right]  # neither None nor 0
    if len(ratios) < 2 or (positive and not (ratios[0].is_real and ratios[0] > 0)):
        return False
    return all(_is_within(ratios[0] - ratio, ratio, ratio, 15) for ratio in ratios)


def is_rounded(exact: Formula, found: Number, places: int) -> bool:
    """Whether the number found is a constant rounded or truncated to ``places``."""
    constant = exact.expression
    if not isinstance(constant, sympy.Expr) or constant.free_symbols or not constant.is_real or constant.is_infinite:
        return False
    return abs(_fraction(constant) - found.value) <= (Fraction(1, 10**places) if places else Fraction(1, 2))


def difference(left: Formula | Number | None, right: Formula | Number | None) -> Formula | None:
    """``left - right``; None if it is undefined."""
    if left is None or right is None:
        return None
    a, b = _expression(left), _expression(right)
    if not isinstance(a, sympy.Expr) or not isinstance(b, sympy.Expr):
        return None
    return Formula(sympy.Add(a, sympy.Mul(-1, b)), False)


def scaled(value: Formula | Number, factor: Fraction) -> Formula | Number:
    if factor == 1:
        return value
    if isinstance(value, Number):
        return value._replace(value=value.value * factor)
    return value._replace(expression=value.expression * sympy.Rational(factor.numerator, factor.denominator))


def entries_of_vector(value: Formula | Number) -> list[Formula]:
    """The entries of a matrix with one row or column; [] for other values."""
    matrix = _expression(value)
    if not isinstance(matrix, sympy.MatrixBase) or 1 not in matrix.shape:
        return []
    return [Formula(entry, value.is_decimal) for entry in matrix]


def names_of(value: Formula | Number) -> set[str]:
    return {symbol.name for symbol in _expression(value).free_symbols}


def _with_products(text: str) -> str:
    r"""Insert a sign between factors that the parser would read as a mixed number: 2(3), (2)(3), 2\frac{3}{2}."""
    text = _PRODUCT.sub(lambda factor: factor[0].rstrip() + r"\cdot ", text)
    return _PRODUCT_WITH_FRACTION.sub(
        lambda factor: rf"{factor[1]}\cdot {factor[2]}" if int(factor[3]) >= int(factor[4]) else factor[0], text
    )


def _refuse_large_text(text: str) -> None:
    if len(text) > _MAX_TEXT:
        raise TooLarge(f"{len(text)} characters")
    deepest = max(accumulate((character in "{([") - (character in "})]") for character in text), default=0)
    if deepest > _MAX_DEPTH:
        raise TooLarge(f"brackets {deepest} deep")
    for pattern, reason in _REFUSED:
        if pattern.search(text):
            raise TooLarge(reason)
    if _BINOMIAL.search(text) and (
        "^" in text or "!" in text or max(map(int, _NUMERAL.findall(text)), default=0) > _MAX_BINOMIAL
    ):
        raise TooLarge("a binomial coefficient or a gamma function of large numbers")


def _refuse_large_value(expression: Any) -> None:
    parts = list(expression) if isinstance(expression, sympy.MatrixBase) else [expression]
    nodes = sum(1 for part in parts for _ in sympy.preorder_traversal(part))
    if nodes > _MAX_NODES:
        raise TooLarge(f"{nodes} operations")
    for part in parts:
        _log10(part)


def _log10(node: Any) -> float:
    """An upper bound on the decimal digits of a node's value, without evaluating it."""
    if isinstance(node, sympy.Pow | sympy.MatPow) and any(isinstance(part, sympy.MatrixBase) for part in node.args):
        raise TooLarge("a power of a matrix")  # sympy expands it
    digits = _log10_of_parts(node)
    if digits > (_MAX_DIGITS_OF_FUNCTION if node.free_symbols else _MAX_DIGITS):
        raise TooLarge(f"a number of more than {_MAX_DIGITS:,} digits")
    return digits


def _log10_of_parts(node: Any) -> float:
    if isinstance(node, sympy.Rational):
        return math.log10(max(abs(int(node.p)), int(node.q)))
    if isinstance(node, sympy.Float):
        return abs(float(sympy.log(abs(node), 10))) if node else 0.0
    parts = [_log10(part) for part in getattr(node, "args", ())]
    if not parts:
        return _LOG10_OF_VARIABLE if isinstance(node, sympy.Symbol | sympy.NumberSymbol) else 1.0
    if isinstance(node, sympy.Pow | sympy.exp):
        exponent = node.args[-1]
        if parts[-1] > 6:
            raise TooLarge("an exponent of more than a million")
        if parts[0] > _MAX_ROOT_DIGITS and not node.free_symbols and exponent.is_Integer is False:
            raise TooLarge("a root of a large number")  # sympy factors the number
        base = parts[0] if isinstance(node, sympy.Pow) else math.log10(math.e)
        return base * _size(exponent, parts[-1])
    if isinstance(node, sympy.factorial | sympy.factorial2 | sympy.gamma | sympy.subfactorial):
        if parts[0] > 5:
            raise TooLarge("a factorial of a large number")
        size = _size(node.args[0], parts[0])
        return size * math.log10(size + 2)
    if isinstance(node, sympy.Mul):
        return sum(parts)
    return max(parts) + (math.log10(len(parts)) if isinstance(node, sympy.Add) else 0.0)


def _size(node: Any, digits: float) -> float:
    """The largest absolute value with that many digits; exact for a rational number."""
    return abs(float(node)) if isinstance(node, sympy.Rational) else float(10**digits)


def _exact(expression: Any) -> Formula | Number | None:
    floats = list(expression.atoms(sympy.Float))
    exact = expression.xreplace({part: sympy.Rational(str(part)) for part in floats}) if floats else expression
    imaginary = {symbol: sympy.I for symbol in exact.free_symbols if symbol.name == "i"}
    exact = exact.xreplace(imaginary) if imaginary else exact
    if isinstance(exact, sympy.MatrixBase):
        return Formula(exact.applyfunc(lambda part: part.doit()).as_immutable(), bool(floats))
    if isinstance(exact, sympy.Expr):
        exact = exact.doit()
        if exact.has(sympy.nan, sympy.zoo):
            return None
        if isinstance(exact, sympy.Rational):
            return Number(Fraction(int(exact.p), int(exact.q)), bool(floats))
    return Formula(exact, bool(floats))


def _as_formula(value: Formula | Number) -> Formula:
    if isinstance(value, Formula):
        return value
    return Formula(sympy.Rational(value.amount.numerator, value.amount.denominator), value.is_decimal)


def _expression(value: Formula | Number) -> Any:
    return _as_formula(value).expression


def _same_matrix(gold: Formula, found: Formula) -> bool:
    a, b = gold.expression, found.expression
    if not isinstance(a, sympy.MatrixBase) or not isinstance(b, sympy.MatrixBase) or a.shape != b.shape:
        return False
    pairs = zip(a, b, strict=True)
    return all(same_formula(Formula(x, gold.is_decimal), Formula(y, found.is_decimal)) for x, y in pairs)


def _same_constant(a: Any, b: Any, is_decimal: bool) -> bool:
    if a == b:
        return True
    if a.is_infinite or b.is_infinite:
        return False
    if is_decimal and a.is_real and b.is_real:
        return is_close(_fraction(a), _fraction(b), is_decimal)
    gap = sympy.Add(a, -b)
    if gap.is_Rational:
        return bool(gap == 0)
    # If the gap is exactly zero, evaluation with this many digits gives almost 0.
    digits = 100 + 2 * int(max(_log10(a), _log10(b)))
    return _is_within(gap.evalf(15, maxn=digits), a, b, digits - 60)


def _is_within(gap: Any, a: Any, b: Any, digits: int) -> bool:
    """Whether the gap is ``digits`` digits smaller than both numbers; False if any of the three is not a number."""
    sizes = [_magnitude(value) for value in (gap, a, b)]
    known = [size for size in sizes if size is not None]
    return len(known) == 3 and bool(known[0] <= (known[1] + known[2]) * sympy.Float(10) ** -digits)


def _magnitude(value: Any) -> Any:
    parts = sympy.N(value, 15).as_real_imag()
    return (
        sympy.sqrt(sum(part**2 for part in parts)) if all(part.is_Number and part.is_finite for part in parts) else None
    )


def _fraction(constant: Any) -> Fraction:
    return Fraction(str(sympy.N(constant, _DIGITS)))


def _at(expression: Any, point: int | Fraction) -> Any:
    """The value with a different number for each variable, with the sign of ``point``; None if undefined."""
    values = {
        symbol: sympy.Rational(point * (300 + zlib.crc32(f"{symbol.name} {point}".encode()) % 997), 499)
        for symbol in expression.free_symbols
    }
    functions = {call: sympy.Symbol(str(call)) for call in expression.atoms(AppliedUndef)}
    if functions:
        return _at(expression.xreplace(functions), point)
    value = expression.xreplace(values)
    value = value if value.is_Rational else value.evalf(_DIGITS)
    return value if value.is_finite and all(part.is_Number for part in value.as_real_imag()) else None


def _terms(node: Any) -> float:
    """An upper bound on a node's number of terms after expansion."""
    parts: list[float] = [_terms(part) for part in node.args]
    if isinstance(node, sympy.Add):
        return sum(parts)
    if isinstance(node, sympy.Mul):
        return float(math.prod(parts))
    if isinstance(node, sympy.Pow) and node.exp.is_Rational and parts[0] > 1:
        return float(parts[0] ** min(abs(float(node.exp)), 100.0))
    return max(parts, default=1.0)
