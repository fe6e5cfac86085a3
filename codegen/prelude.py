"""Device functions that generated kernels call. Read as text: a kernel's file holds the ones it uses."""

import triton
import triton.language as tl


@triton.jit
def floor_div(x, d):
    """x // d for d > 0, rounding down (Triton's own rounds towards zero)."""
    return x // d - tl.where(x % d < 0, 1, 0)


@triton.jit
def floor_mod(x, d):
    """x % d for d > 0, in [0, d)."""
    r = x % d
    return tl.where(r < 0, r + d, r)


@triton.jit
def widened(x):
    """An integer of an input, with the 32 bits that arithmetic takes, where memory holds fewer."""
    if tl.constexpr(x.dtype.primitive_bitwidth) < tl.constexpr(32):
        x = x.to(tl.int32)
    return x


@triton.jit
def wide(x):
    """An integer of an input as an operand of what may be larger than it."""
    return x.to(tl.int64)


@triton.jit
def narrow(x):
    """An integer of 64 bits as one of 32 that compares alike with those that fit them."""
    return tl.minimum(tl.maximum(x, -2147483647), 2147483647).to(tl.int32)


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def within(x, last):
    """An index between 0 and the last one; 0 where there is none."""
    return tl.maximum(tl.minimum(x, last), 0)


@triton.jit
def is_power_of_two(x):
    return (x > 0) & ((x & (x - 1)) == 0)


@triton.jit
def bit_length(x):
    """Number of bits of x, 0 where x is not positive."""
    x = tl.maximum(x, 0)
    bits = tl.where(x > 0, 1, 0)
    for step in tl.static_range(5):
        high = x >= (1 << (16 >> step))
        bits += tl.where(high, 16 >> step, 0)
        x = tl.where(high, x >> (16 >> step), x)
    return bits


@triton.jit
def mix64(x, y):
    """The output of SplitMix64 in state x ^ y."""
    z = (tl.cast(x, tl.uint64) ^ tl.cast(y, tl.uint64)) + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def drawn(hash, member, last_hash, last):
    """Whether a member comes no later than the last one drawn: by its hash, then by its index."""
    last_hash = tl.cast(last_hash, tl.uint64)
    return (hash < last_hash) | ((hash == last_hash) & (member <= last))


@triton.jit
def listed(lists_ptr, row, entries, member):
    """Whether the list of increasing numbers that begins at a place has a member. row, member: they broadcast."""
    # The number of entries that are no greater, by its bits.
    count = (row * 0 + member * 0).to(tl.int32)
    step = 1 << 30
    while step > entries:
        step = step // 2
    while step > 0:
        ahead = count + step
        entry = tl.load(lists_ptr + row + ahead - 1, mask=ahead <= entries, other=2147483647)
        count = tl.where(entry <= member, ahead, count)
        step = step // 2
    return tl.load(lists_ptr + row + count - 1, mask=count > 0, other=-1) == member


@triton.jit
def sigmoid(x):
    """As Triton's own, which Gluon has not."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Hyperbolic tangent, accurate to float32 (near 0 by a polynomial: Cephes)."""
    z = x * x
    p = -5.70498872745e-3
    p = p * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    near = p * z * x + x
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def kept(seed, b, h, q_pos, k_first, drop_below, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which pairs of a tile dropout keeps: q_pos [BLOCK_Q, 1], keys from k_first, a multiple of 4.

    Philox-4x32-10 of the counter (k // 4, q, h, b) makes the words of four keys.
    """
    group = k_first // 4 + tl.arange(0, BLOCK_K // 4)[None, :]
    word_0, word_1, word_2, word_3 = tl.philox(seed, group, q_pos, h, b)
    even = tl.join((word_0 >= drop_below).to(tl.int8), (word_2 >= drop_below).to(tl.int8))
    odd = tl.join((word_1 >= drop_below).to(tl.int8), (word_3 >= drop_below).to(tl.int8))
    return tl.join(even, odd).reshape(BLOCK_Q, BLOCK_K) != 0


@triton.jit
def kept_apart(seed, b, h, q_pos, k_pos, drop_below):
    """Which pairs dropout keeps, wherever the keys lie: q_pos [BLOCK_Q, 1], k_pos [1, BLOCK_K]. As `kept`."""
    word_0, word_1, word_2, word_3 = tl.philox(seed, k_pos // 4, q_pos, h, b)
    place = k_pos % 4
    even, odd = tl.where(place == 0, word_0, word_2), tl.where(place == 1, word_1, word_3)
    return tl.where(place % 2 == 0, even, odd) >= drop_below


@triton.jit
def softcap(x, cap):
    return cap * tanh(x / cap)


@triton.jit
def from_e4m3(bits):
    """float8 e4m3, given as its bits, as float16: exact for all finite numbers, on any device."""
    bits = bits.to(tl.uint16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def listed_keys(list_at, places, list_size, MEMBER: tl.constexpr):
    """The keys at places of a list of members, -1 where there is none."""
    nth = places // MEMBER
    member = tl.load(list_at + nth, mask=nth < list_size, other=-1)
    return tl.where(member >= 0, member * MEMBER + places % MEMBER, -1)


@triton.jit
def ranked(score, member):
    """A key that orders scores as numbers, and equal ones by the lower member. Zeros are equal, whatever their sign."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - member).to(tl.int64)


@triton.jit
def lists_of(least, LENGTH: tl.constexpr):
    """Lists without anything in them: a tensor for each place."""
    places = ()
    for _ in tl.static_range(LENGTH):
        places += (least,)
    return places


@triton.jit
def take_up(best, keys):
    """Lists of the greatest keys, the greatest first, when each is offered one more."""
    places = ()
    for i in tl.static_range(len(best)):
        greater = tl.maximum(best[i], keys)
        places += (greater,)
        # The other of the two, without comparing again.
        keys = best[i] ^ keys ^ greater
    return places


@triton.jit
def without_first(best, taken, least):
    """The lists when some have lost their first key."""
    places = ()
    for i in tl.static_range(len(best) - 1):
        places += (tl.where(taken, best[i + 1], best[i]),)
    places += (tl.where(taken, least, best[len(best) - 1]),)
    return places


@triton.jit
def larger(x, y):
    return tl.maximum(x, y)
