"""exp and log of sixteen float32 at once: polynomials of Cephes' expf and logf (Moshier, 1989), to about one unit in
the last place. The same argument gives the same result in any lane."""

from numba import njit

from .simd import bits_of_f32, f32_of_bits, f32_of_i32, fma, select_less, splat_f32, splat_i32


@njit(cache=True, nogil=True)
def exp(x):
    """e ** x; what would leave the range of normal numbers is taken for its end. A NaN stays one."""
    x = select_less(splat_f32(88.0), x, splat_f32(88.0), x)
    x = select_less(x, splat_f32(-87.0), splat_f32(-87.0), x)
    # Behind such a large number floats are whole: the sum's low bits are x / ln 2, rounded.
    shifted = fma(x, splat_f32(1.44269504), splat_f32(12582912.0))
    powers = shifted - splat_f32(12582912.0)
    # ln 2 in two parts, the first of which has few bits, so that its product is exact.
    x = fma(powers, splat_f32(-0.693359375), x)
    x = fma(powers, splat_f32(2.12194440e-4), x)
    p = fma(splat_f32(1.9875691500e-4), x, splat_f32(1.3981999507e-3))
    p = fma(p, x, splat_f32(8.3334519073e-3))
    p = fma(p, x, splat_f32(4.1665795894e-2))
    p = fma(p, x, splat_f32(1.6666665459e-1))
    p = fma(p, x, splat_f32(5.0000001201e-1))
    p = fma(p, x * x, x + splat_f32(1.0))
    return p * f32_of_bits((bits_of_f32(shifted) + splat_i32(127)) << splat_i32(23))


@njit(cache=True, nogil=True)
def log(x):
    """The natural logarithm of positive normal numbers."""
    # x = 2 ** exponent * (1 + f), 1 + f in [1 / sqrt(2), sqrt(2)).
    bits = bits_of_f32(x)
    exponent = (bits - splat_i32(0x3F3504F3)) >> splat_i32(23)
    f = f32_of_bits(bits - (exponent << splat_i32(23))) - splat_f32(1.0)
    powers = f32_of_i32(exponent)
    p = fma(splat_f32(7.0376836292e-2), f, splat_f32(-1.1514610310e-1))
    p = fma(p, f, splat_f32(1.1676998740e-1))
    p = fma(p, f, splat_f32(-1.2420140846e-1))
    p = fma(p, f, splat_f32(1.4249322787e-1))
    p = fma(p, f, splat_f32(-1.6668057665e-1))
    p = fma(p, f, splat_f32(2.0000714765e-1))
    p = fma(p, f, splat_f32(-2.4999993993e-1))
    p = fma(p, f, splat_f32(3.3333331174e-1))
    square = f * f
    rest = fma(p * f, square, powers * splat_f32(-2.12194440e-4))
    rest = fma(square, splat_f32(-0.5), rest)
    return fma(powers, splat_f32(0.693359375), f + rest)
