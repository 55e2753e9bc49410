"""Matrix products of small tiles, in the precision that each of them needs, and the inverse of a triangular tile.

Two kinds of products. A "fine" one has float32 operands, taken by the tensor cores as FINE says ("tf32", "tf32x3",
"bf16x3" or "ieee"): for factors whose errors add up. A "coarse" one rounds its operands to the type COARSE first. In
Triton's interpreter, which multiplies in float32 whatever it is asked, FINE = "emulated" rounds operands as tf32 does.
"""

import triton
import triton.language as tl


@triton.jit
def rounded_to_tf32(x):
    """x with 10 bits of mantissa, ties away from zero."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def rounded_to_bf16(x):
    """x with 7 bits of mantissa, ties to even, still float32 (the interpreter's own conversion cuts bits off)."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def fine(a, b, FINE: tl.constexpr):
    """a @ b with float32 operands; see the head of this file."""
    if FINE == "emulated":
        product = tl.dot(rounded_to_tf32(a), rounded_to_tf32(b))
    else:
        product = tl.dot(a, b, input_precision=FINE)
    return product


@triton.jit
def coarse(a, b, COARSE: tl.constexpr, FINE: tl.constexpr):
    """a @ b with operands of type COARSE, summed in float32; a fine product where COARSE is float32."""
    if tl.float32 == COARSE:
        product = fine(a, b, FINE)
    elif FINE != "emulated":
        product = tl.dot(a.to(COARSE), b.to(COARSE))
    elif tl.bfloat16 == COARSE:
        product = tl.dot(rounded_to_bf16(a), rounded_to_bf16(b))
    else:
        product = tl.dot(a.to(COARSE).to(tl.float32), b.to(COARSE).to(tl.float32))
    return product


@triton.jit
def inverse(A, L: tl.constexpr, FINE: tl.constexpr):
    """(I - A)^-1 of a strictly lower triangular A (L, L), L a power of 2, in 2 log2(L) - 2 products.

    Blocks of 2 are inverted by I + A, then blocks of twice the size by X + X E X, E being what lies between the two
    halves. Every intermediate is part of an inverse. The Neumann product (I+A)(I+A^2)(I+A^4)(I+A^8) costs as much, but
    its powers grow like binomial coefficients where tokens repeat, and cancel: three digits are lost at L = 16.
    """
    row = tl.arange(0, L)[:, None]
    column = tl.arange(0, L)[None, :]
    X = tl.where(row // 2 == column // 2, A, 0.0) + tl.where(row == column, 1.0, 0.0)
    for level in tl.static_range(1, 6):
        if 2**level < L:
            size = 2**level
            between = (row // size != column // size) & (row // (2 * size) == column // (2 * size))
            X += fine(fine(X, tl.where(between, A, 0.0), FINE), X, FINE)
    return X
