"""Functions that generated CPU code calls. Read as text: a generated file holds the ones it uses."""

import torch


def tensor(x):
    """Numbers as tensors. A float64 without dimensions does not widen what it is combined with."""
    return torch.as_tensor(x, dtype=torch.float64) if isinstance(x, float) else torch.as_tensor(x)


def real(x, dtype):
    """An integer as a float."""
    return torch.as_tensor(x).to(dtype)


def where(cond, then, other):
    """Elementwise choice; numbers become tensors."""
    return torch.where(torch.as_tensor(cond), tensor(then), tensor(other))


def minimum(a, b):
    return torch.minimum(tensor(a), tensor(b))


def maximum(a, b):
    return torch.maximum(tensor(a), tensor(b))


def clamp(x, low, high):
    return minimum(maximum(x, low), high)


def is_power_of_two(x):
    x = torch.as_tensor(x)
    return (x > 0) & ((x & (x - 1)) == 0)


def bit_length(x):
    """Number of bits of x, 0 where x is not positive."""
    x = torch.as_tensor(x)
    return sum((x >= (1 << i)).to(torch.int64) for i in range(31))


def philox(seed, b, h, q_pos, group):
    """The words of four keys by Philox-4x32-10 of (group, q, h, b), group = k // 4: they lie along a last dimension."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = group.to(torch.int64) & low, q_pos.to(torch.int64) & low, h & low, b & low
    k0, k1 = int(seed) & low, (int(seed) >> 32) & low
    for _ in range(10):
        # Products of 64 bits, whose sign the masks take away.
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((right >> 32) & low) ^ c1 ^ k0, right & low
        c2, c3 = ((left >> 32) & low) ^ c3 ^ k1, left & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def kept(seed, b, h, q_pos, spans, drop_below):
    """Which pairs of the spans' keys dropout keeps."""
    found = []
    for first, end in spans:
        words = philox(seed, b, h, q_pos, torch.arange(first // 4, -(-end // 4))).flatten(-2)
        found.append(words[..., first % 4 : first % 4 + end - first] >= drop_below)
    return torch.cat(found, dim=-1)


def kept_apart(seed, b, h, q_pos, k_pos, drop_below):
    """Which pairs dropout keeps, wherever the keys lie."""
    words = philox(seed, b, h, q_pos, k_pos // 4)
    place = (k_pos % 4).view(-1, 1).expand(*words.shape[:-1], 1)
    return words.gather(-1, place)[..., 0] >= drop_below


def mix64(x, y):
    """The output of SplitMix64 in state x ^ y, as the bits of a signed integer, whose shifts repeat the sign."""
    z = (torch.as_tensor(x) ^ torch.as_tensor(y)).to(torch.int64) - 0x61C8864680B583EB
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return z ^ (z >> 31 & (1 << 33) - 1)


def drawn(hash, member, last_hash, last):
    """Whether a member comes no later than the last one drawn: by its hash, unsigned, then by its index."""
    hash, last_hash = hash ^ -(1 << 63), last_hash ^ -(1 << 63)
    return (hash < last_hash) | ((hash == last_hash) & (member <= last))


def exponential(x):
    """e to the x, which is written over. By powers of two: torch.exp takes many times as long where the result is 0."""
    return x.mul_(1.4426950408889634).exp2_()


def within_members(scores, member):
    """A softmax of scores [..., keys] inside each member, whose numbers [keys] count from 0; 0 of what is not seen."""
    top = scores.new_full((*scores.shape[:-1], int(member.max()) + 1), -torch.finfo(scores.dtype).max)
    top.scatter_reduce_(-1, member.expand_as(scores), scores, "amax")
    inner = exponential(scores - top[..., member])
    total = torch.zeros_like(top).index_add_(-1, member, inner)
    return inner / torch.where(total == 0, 1, total)[..., member]


def of_members(values, member):
    """The sum over its member in the place of each of the values [..., keys]."""
    count = int(member.max()) + 1
    return values.new_zeros(*values.shape[:-1], count).index_add_(-1, member, values)[..., member]


def softcap(x, cap):
    return cap * torch.tanh(x / cap)


def key_spans(runs, block, k_len):
    """Runs of tiles (first, count, step) as ranges of keys, neighbours joined."""
    spans = []
    for first, count, step in runs:
        tiles = (
            [(first, first + count)] if step == 1 else [(t, t + 1) for t in range(first, first + count * step, step)]
        )
        spans += [(low * block, min(high * block, k_len)) for low, high in tiles if low < high]
    joined = []
    for low, high in sorted(spans):
        if joined and joined[-1][1] == low:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return joined


def listed(entries, first, count, step):
    """The tiles at the places first, first + step, … of a list, each as a run of one tile."""
    return [(tile, 1, 1) for tile in entries[first : first + count * step : step].tolist()]


def spans_listed(entries, head):
    """The spans that a list has for a tile, whose numbers begin at a place, as runs of tokens."""
    at, end, _ = entries[head : head + 3].tolist()
    ends, shifts = entries[at:end].tolist(), entries[end : 2 * end - at].tolist()
    return [
        (low + shift, high - low, 1) for low, high, shift in zip([0, *ends][: len(ends)], ends, shifts, strict=True)
    ]


def looked_up(lists, member):
    """Whether lists of increasing numbers, [..., rows, 1, entries], have members, [..., rows, keys]."""
    member = torch.as_tensor(member)
    size = torch.broadcast_shapes(lists.shape[:-1], member.shape)
    lists = lists.squeeze(-2).expand(*size[:-1], -1).to(torch.int64).contiguous()
    member = member.to(torch.int64).expand(size).contiguous()
    if not lists.shape[-1]:
        return torch.zeros(size, dtype=torch.bool)
    at = torch.searchsorted(lists, member).clamp(max=lists.shape[-1] - 1)
    return lists.gather(-1, at) == member


def listed_by_tile(entries, first, count):
    """The entries of a list at the `count` places from `first`, of each own tile."""
    entries, places = entries.tolist(), zip(first.tolist(), count.tolist(), strict=True)
    return [entries[at : at + max(n, 0)] for at, n in places]


def groups(full, partial, whole, size):
    """Own tiles that go together, as (first, end): one, or several whose lists, made as long as the longest of them,
    have at most `size` tiles, not many of which make up. Tiles past the first `whole` ones have fewer rows."""
    first, longest, listed = 0, (0, 0), 0
    for own, here in enumerate((len(a), len(b)) for a, b in zip(full, partial, strict=True)):
        longest, listed = (max(longest[0], here[0]), max(longest[1], here[1])), listed + sum(here)
        made = (own + 1 - first) * sum(longest)
        if own > first and (own >= whole or made > size or made - listed > size // 4):
            yield first, own
            first, longest, listed = own, here, sum(here)
    if full:
        yield first, len(full)


def by_tile(x, tiles):
    """A view of the rows of a head's tiles, x [batch, 1, 1, tiles * rows, …], as [tiles, batch, 1, rows, …]."""
    return x[:, 0].unflatten(2, (tiles, -1)).movedim(2, 0)


def portions(full, partial, absent, size):
    """The lists of tiles that go together, [tiles, entries] made up by `absent`, and how many of the last entries are
    partial: in portions of at most `size` tiles."""
    width, seen = max(map(len, full)), max(map(len, partial))
    lists = [
        a + [absent] * (width - len(a)) + b + [absent] * (seen - len(b)) for a, b in zip(full, partial, strict=True)
    ]
    step = max(1, size // len(lists))
    for low in range(0, width + seen, step):
        high = min(low + step, width + seen)
        yield torch.tensor([row[low:high] for row in lists]), max(0, high - max(low, width))


def gather_by_tile(x, tokens, tiles):
    """The rows of a head's x [batch, 1, keys, dim] at the tokens of tiles, as [tiles, batch, tokens of one, dim]."""
    return x.index_select(-2, tokens)[:, 0].unflatten(1, (tiles, -1)).movedim(1, 0)


def chunks(full, partial, size):
    """Spans in portions of at most `size` keys: (full spans, partial spans) each."""
    portion, room = ([], []), size
    for kind, spans in enumerate((full, partial)):
        for low, high in spans:
            while low < high:
                end = min(high, low + room)
                portion[kind].append((low, end))
                room -= end - low
                low = end
                if room == 0:
                    yield portion
                    portion, room = ([], []), size
    if portion[0] or portion[1]:
        yield portion


def cells(spans):
    """The indices along each axis of the cells of a product, given the spans along each."""
    along = [torch.cat([torch.arange(low, high) for low, high in some]) if some else torch.arange(0) for some in spans]
    return [x.flatten() for x in torch.meshgrid(*along, indexing="ij")]


def visited(axes, products):
    """The indices along each axis of the cells of several products."""
    found = [cells(spans) for spans in products]
    return [torch.cat([x[a] for x in found]) if found else torch.arange(0) for a in range(axes)]


def gather(x, spans):
    """The rows of x [..., tokens, dim] in the spans, without a copy where there is one span."""
    if len(spans) == 1:
        return x[..., spans[0][0] : spans[0][1], :]
    return torch.cat([x[..., low:high, :] for low, high in spans], dim=-2)


def gather_pages(x, pages, heads, spans):
    """The rows of a cache x [slots, heads, page, dim] in the spans of a sequence, as [1, heads, rows, dim].

    A page that does not exist counts as zeros.
    """
    size = x.shape[2]
    # By bytes where elements are of one: few operators take 8-bit floats.
    bits = x.view(torch.uint8) if x.element_size() == 1 else x
    cuts = [(page, low, high) for low, high in spans for page in range(low // size, (high - 1) // size + 1)]
    if len(cuts) <= 32:
        places = [
            (pages[page].item(), max(low - page * size, 0), min(high - page * size, size)) for page, low, high in cuts
        ]
        pieces = [
            bits[page : page + 1, heads, low:high]
            if 0 <= page < x.shape[0]
            else torch.zeros_like(bits[:1, heads, low:high])
            for page, low, high in places
        ]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)).view(x.dtype)
    at = positions(spans)
    page = pages[at // size]
    exists = (page >= 0) & (page < x.shape[0])
    rows = bits[:, heads][page.clamp(0, x.shape[0] - 1), :, at % size].transpose(0, 1)
    return torch.where(exists[:, None], rows, 0)[None].view(x.dtype)


def positions(spans):
    return torch.cat([torch.arange(low, high) for low, high in spans])


def spread(x, like):
    """A number, or a tensor of any dtype, as a tensor of its own of the shape and dtype of `like`."""
    return (torch.zeros_like(like) + x).to(like.dtype)


def passed_on(gradient, slope):
    """gradient * slope, 0 where the gradient is 0, even where the slope is infinite or not a number."""
    return torch.where(gradient == 0, 0, (gradient * slope).to(gradient.dtype))


def scatter(x, spans, values):
    """Add values [..., tokens, dim] to the rows of x in the spans."""
    at = 0
    for low, high in spans:
        x[..., low:high, :] += values[..., at : at + high - low, :]
        at += high - low


def accumulate(x, index, values):
    """Add values to the entries of x that the index names, first summed where the index does not vary."""
    index = [torch.as_tensor(i) for i in index]
    values = values.to(x.dtype).sum_to_size(torch.broadcast_shapes(*(i.shape for i in index)))
    x.index_put_(tuple(index), values, accumulate=True) if index else x.add_(values)


def cut(low, high, size):
    """A range as (first block, blocks, low, high) of blocks of a size: whole blocks together, else a part of one."""
    while low < high:
        whole = (high - low) // size if low % size == 0 else 0
        end = low + whole * size if whole else min(high, (low // size + 1) * size)
        yield low // size, max(whole, 1), low, end
        low = end


def observe(observed, weights, first, classes, spans, size, largest):
    """Add weights [..., rows, keys of the spans] to observed [..., row classes, blocks of keys], or keep the largest.

    classes: the rows, of which those of `weights` begin at `first`, as `cut` gives them.
    """

    def reduced(x, dim, count):
        x = x.unflatten(dim, (count, -1))
        return x.amax(dim) if largest else x.sum(dim)

    for row_class, rows, low, high in classes:
        of_rows, at = reduced(weights[..., low - first : high - first, :].mT, -1, rows).mT, 0
        for span_low, span_high in spans:
            for member, count, low, high in cut(span_low, span_high, size):
                found = reduced(of_rows[..., at : at + high - low], -1, count)
                at += high - low
                place = observed[..., row_class : row_class + rows, member : member + count]
                place.copy_(torch.maximum(place, found) if largest else place + found)
