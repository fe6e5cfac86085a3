"""The public interface: `compile`, the attention it returns, and `compare`. The only module that wires the parts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attndsl.asking import arguments, asked, batch_of, check_names, check_plain, checked, known, of_lengths, tokens_of
from attndsl.compose import check_lse, compose
from attndsl.diagnostics import Diagnostic, PatternWarning, Source, error
from attndsl.parts import part_of, parts_of
from attndsl.plans import own_program
from attndsl.program import CallShape, Program
from attndsl.runtime.registry import attend_operator
from attndsl.source_files import read_source
from attndsl.wiring import decode_kept, format_source, kernel_cache, measure, read_program, registered

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from attndsl.blockgraph import BlockGraph
    from attndsl.comparison import Comparison
    from attndsl.eviction import Retention
    from attndsl.explain import Explanation
    from attndsl.piece_tiles import PieceTiles


def compile(source: str | os.PathLike[str], *, name: str | None = None, **params: object) -> Attention:
    """Compile a pattern.

    >>> import attndsl
    >>> attn = attndsl.compile("causal & (window(512) | sink(4))")

    source: source text, or the path of a file (a string that ends in `.attn`, or any `os.PathLike`).
    name: which of a file's programs (default: its only attention, else its last pattern).
    params: values of the program's parameters; a table takes a nested sequence of numbers.

    Raises `PatternError` with every mistake found.
    """
    attn = load_attention(source, name=name, **params)
    for warning in attn.warnings:
        warnings.warn(warning.render(), PatternWarning, stacklevel=2)
    return attn


def load_attention(source: str | os.PathLike[str], *, name: str | None = None, **params: object) -> Attention:
    """`compile` without its warnings, which are in `Attention.warnings`."""
    return Attention(*read_program(source_of(source), name, params))


def source_of(source: str | os.PathLike[str]) -> Source:
    """The text that `compile` would compile. Raises `PatternError` if a file cannot be read."""
    if isinstance(source, os.PathLike) or source.endswith(".attn"):
        return read_source(source)
    return Source("<pattern>", source)


def compare(a: Attention | str | os.PathLike[str], b: Attention | str | os.PathLike[str]) -> Comparison:
    """How two patterns relate, over all lengths: equal, contains, contained, overlaps or disjoint, with witnesses.

    >>> import attndsl
    >>> attndsl.compare("causal & window(64)", "causal").verdict.value
    'contained'

    a, b: attentions, or what `compile` takes. Scores play no part; inputs of one name are the same in both.
    Raises `PatternError` when the answer is not found within the effort bound, or the two have other positions.
    """
    from attndsl.comparison import Undecided, compare

    first, second = (x.program if isinstance(x, Attention) else load_attention(x).program for x in (a, b))
    check_plain(first, second)
    try:
        return compare(first, second)
    except Undecided as given_up:
        raise error("A540", str(given_up), help="compare simpler patterns, or their masks at some length") from None
    except ValueError as problem:
        raise error("A541", str(problem), help="write `align start` in both or in neither") from None


class Attention:
    """A compiled attention. Call it on tensors; everything else looks inside.

    Attributes:
        program: the typed program.
        warnings: what there is to warn about.
    """

    def __init__(
        self, program: Program, warnings: tuple[Diagnostic, ...] = (), keep_text: Callable[[], None] | None = None
    ) -> None:
        self.program = program
        self.warnings = warnings
        self._inputs = tuple(decl.name for decl in own_program(program).inputs)
        self._attend = attend_operator()
        # Known before the first call, which may be one that torch.compile traces.
        self._key = registered(program, keep_text)
        self._composition = compose(program)
        parts = () if program.plain else self._composition.programs
        self._parts = tuple(registered(part, keep_text) for part in parts)

    def __reduce__(self) -> tuple[type[Attention], tuple[Program, tuple[Diagnostic, ...]]]:
        """Copies and pickles are compiled anew: another process has to know the program too."""
        return Attention, (self.program, self.warnings)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        return_lse: bool = False,
        backend: str = "auto",
        dropout: float = 0,  # An integer: for torch.compile the float would be a value that changes.
        seed: int | Tensor | None = None,
        plans: Mapping[str, Tensor] | None = None,
        views: Mapping[str, tuple[Tensor, ...]] | None = None,
        return_observed: bool = False,
        scales: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
        **inputs: Any,
    ) -> Any:
        """Attend.

        q: [B, Hq, Nq, D]; k: [B, Hkv, Nk, D]; v: [B, Hkv, Nk, Dv], one dtype (bfloat16, float16, float32; float64 on
        the CPU), Hq a multiple of Hkv, D and Dv multiples of 8 up to 256. Returns [B, Hq, Nq, Dv] in that dtype, and
        with `return_lse` the natural log-sum-exp too, float32 [B, Hq, Nq].

        scale: factor of q . k; default 1/sqrt(D), or the program's own. inputs: the program's inputs (tensors) and
        runtime arguments (ints), by name. Raises `PatternError` when they do not fit. Gradients repeat to the bit;
        on Hopper that of q does if `torch.use_deterministic_algorithms(True)` asks for it.

        dropout: the share, in [0, 1), of the weights after the softmax that are set to 0; the others are divided by
        1 - dropout. lse is that without it. Which are dropped is a function of seed, batch entry, query head and the
        positions of query and key alone (Philox-4x32-10: `attndsl.dropout`), the same on every device.
        seed: an int of 64 bits, or an int64 tensor of one element on the call's device; by default it is drawn from
        torch's generator. Pass a tensor where a CUDA graph is replayed and you set the seeds yourself.

        plans: in the place of what selections would choose, by name: see `plan`. `among` holds of them all the same.
        views: the entries of pooled views, as `views` returns them; default: they are made from k and v.

        return_observed: return last a dict of what the program observes, by name: float32 [B, Hq, R, M], for each class
        of rows and member of the keys the sum, or the largest, of the branch's probabilities. They are found from q, k
        and lse in a second pass over the tiles that the pattern visits, and have no gradient.

        scales: of q, k and v of float8_e4m3fn, what their numbers are multiplied by: each a float tensor of one number
        or of one a head, none negative, or None for 1. The output is bfloat16; there are no gradients.
        """
        attend = self._attend or attend_operator(needed=True)
        given, args = self._given(inputs)
        if scales is not None or getattr(getattr(q, "dtype", None), "itemsize", 0) == 1:
            from attndsl.runtime.quantized_op import attend_quantized

            plain = not (self._parts or self.program.selections or plans or views or return_observed or dropout)
            found = attend_quantized(self._key, plain, q, k, v, scales, given, args, scale, backend)
            return self._with_lse(*found) if return_lse else found[0]
        observed: dict[str, Tensor] = {}
        if self._parts or views or (return_observed and self.program.observations):
            from attndsl.runtime.compose import attend_composed

            composed = (self.program, self._key, self._composition, self._parts)
            out, lse, observed = attend_composed(
                *composed, q, k, v, given, args, scale, backend, dropout, seed, plans or {}, views, return_observed
            )
        else:
            if self.program.selections or plans:
                from attndsl.runtime.compose import with_plans

                given = with_plans(self.program, self._key, self._composition, q, k, given, args, scale, plans or {})
            out, lse = attend(self._key, q, k, v, given, args, scale, backend, dropout, seed, return_lse)
        if return_observed:
            return (*self._with_lse(out, lse), observed) if return_lse else (out, observed)
        return self._with_lse(out, lse) if return_lse else out

    def views(
        self, k: Tensor, v: Tensor, seq_lens: Tensor | None = None, page_table: Tensor | None = None, *,
        layout: str = "hnd", k_scale: Tensor | None = None, v_scale: Tensor | None = None, dtype: Any = None,
        **inputs: Tensor,
    ) -> dict[str, tuple[Tensor, ...]]:  # fmt: skip
        """The entries of each pooled view, keys [B, Hkv, entries, D] and values [B, Hkv, entries, Dv], by its name.

        >>> import attndsl, torch
        >>> attn = attndsl.compile("attention a { attend causal over pool(mean, 4) }")
        >>> {name: keys.shape for name, (keys, values) in attn.views(*torch.zeros(2, 1, 1, 10, 8)).items()}
        {'pool(mean, 4)': torch.Size([1, 1, 3, 8])}

        inputs: those whose segments are pooled, of caches what `lengths` reads. seq_lens, page_table, layout: of
        caches, as `decode` takes them. All that it needs beside them is returned then, with room for all tokens, what
        selections go by (`mean(K) over blocks(64)`, in float32, no values) included; of an 8-bit cache, whose scales
        are those of `decode`, what is attended is of `dtype`, the queries' (default: bfloat16).
        `serving.update_views` makes anew what tokens change.
        """
        if seq_lens is not None:
            cache = (k, v, seq_lens, page_table, layout, k_scale, v_scale, dtype, of_lengths(self.program, inputs))
            return dict(decode_kept().cache_views(self.program, self._key, self._composition, *cache))
        if self.program.lengths is not None:
            what = f"views of tokens that `lengths {self.program.lengths}` bounds are made by the call"
            raise error("A565", what, self.program.span, help="leave `views` out")
        from attndsl.runtime.compose import make_views

        return dict(make_views(self._key, self._composition, k, v, inputs))

    def decode(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, page_table: Tensor | None = None, *,
        layout: str = "hnd", scale: float | None = None, return_lse: bool = False, k_scale: Tensor | None = None,
        v_scale: Tensor | None = None, backend: str = "auto", plans: Mapping[str, Tensor] | None = None,
        views: Mapping[str, tuple[Tensor, ...]] | None = None, **inputs: Any,
    ) -> Any:  # fmt: skip
        """Attend from the last n tokens of each of B sequences to their caches: what the same rows of a call on a
        sequence alone give. Decoding (n = 1), speculative decoding and prefill in chunks. It has no gradient.

        q: [B, Hq, n, D], the last n positions of each sequence. seq_lens: int32 [B], lengths with the new tokens, whose
        keys and values are in the caches; rows before a sequence's first token give 0 and lse -inf.
        k_cache: [B, Hkv, M, D], v_cache: [B, Hkv, M, Dv]; with page_table, int32 [B, P], they are pools of pages
        [pages, Hkv, page, D], and entry i holds the page of tokens i * page and on (-1: given back, see `evictable`).
        layout: "hnd", or "nhd" for tokens before heads. Caches are of q's dtype, or float8_e4m3fn, whose numbers
        k_scale and v_scale multiply: float tensors of one number, or one a key head.
        inputs: as in a call; an input over k has the caches' capacity, M or P * page, in place of Nk.
        plans: in the place of what selections would choose, by name, int32 [B, H', n, C]: see `attndsl.serving.plan`.
        views: what `views` made of these caches, kept up to date. What is not handed in is made here, of all tokens.

        Returns [B, Hq, n, Dv] in q's dtype, and with `return_lse` float32 [B, Hq, n]. Lengths and page tables are read
        on the device only, and what lies outside the caches is never read: a CUDA graph of a call serves all lengths.
        Raises `PatternError` when shapes, dtypes or devices do not fit, and where the environment has ATTNDSL_DEBUG
        also for lengths past the cache and pages that do not exist.
        """
        from attndsl.runtime.decode_op import decode, in_order

        given, args = self._given(inputs)
        cache = (k_cache, v_cache, seq_lens, page_table)
        if self._parts or self.program.selections or plans or views:
            from attndsl.runtime.compose_decode import decode_composed

            composed = (self.program, self._key, self._composition, self._parts)
            call = in_order(q, *cache, layout, k_scale, v_scale, scale)
            out, lse = decode_composed(*composed, call, given, args, scale, backend, plans or {}, views)
        else:
            out, lse = decode(self._key, q, *cache, k_scale, v_scale, given, args, scale, layout, backend)
        return self._with_lse(out, lse) if return_lse else out

    def plan(
        self, q: Tensor, k: Tensor, *, scale: float | None = None, plans: Mapping[str, Tensor] | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        """What the program's selections choose in a call, by name: a `plan`'s own, or that of the function (`top`).

        >>> import attndsl, torch
        >>> text = "attention a { plan near = top(2, blocks(4), among = causal, by = dot(Q, mean(K))) attend causal }"
        >>> attndsl.compile(text).plan(torch.ones(1, 1, 9, 8), torch.ones(1, 1, 9, 8))["near"][0, 0, ::4]
        tensor([[ 0, -1],
                [ 0,  1],
                [ 0,  1]], dtype=torch.int32)

        q: [B, Hq, Nq, D], k: [B, Hkv, Nk, D]; scale and inputs as in a call. A plan is int32 [B, H', R, C]: members in
        increasing order and -1 after them, for each row class; H' is Hq, Hkv or 1, as heads share. Where nothing bounds
        how many are chosen it is uint8 [B, H', R, M], an entry a member: 0 where it is out, 1, or the factor of its
        level. It has no gradient. Nothing waits for the device. Raises `PatternError` when the call does not fit.
        """
        from attndsl.runtime.compose import make_plans

        composed = (self.program, self._key, self._composition, self._parts)
        return make_plans(*composed, q, k, *self._given(inputs), scale, plans or {})

    def evictable(self, seq_len: int, page: int = 1, **inputs: Any) -> list[int]:
        """Pages of a sequence that no row from position `seq_len` on can read, at any length and whatever the data.

        >>> import attndsl
        >>> attndsl.compile("causal & (window(8) | sink(4))").evictable(24, page=4)
        [1, 2, 3]

        page: tokens of a page. inputs: arguments and inputs that are known; of those read at keys, as `until[k]`, the
        tensors decide, of all sequences and heads. A column that the pattern leaves and comes back to is not evictable;
        a page once evictable stays so, as long as the inputs do.
        """
        import numpy as np

        needed, (arrays, _) = self.retention(page, **inputs), known(self.program, inputs)
        pages = np.arange(tokens_of(seq_len) // page)
        return [int(i) for i in pages[needed.evictable(seq_len, pages, arrays)]]

    def retention(self, page: int = 1, told: Sequence[str] = (), /, **inputs: Any) -> Retention:
        """What `evictable` decides by, for every length: see `attndsl.eviction`, `told` too."""
        from attndsl.eviction import retention_of

        return retention_of(self.program, self._composition, page, *known(self.program, inputs), told)

    def _given(self, inputs: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
        """The program's inputs and its runtime arguments, in order."""
        if not (inputs or self._inputs or self.program.args):
            return [], []
        if len(inputs) != len(self._inputs) + len(self.program.args):
            check_names(own_program(self.program), inputs)
        try:
            return [inputs[name] for name in self._inputs], [inputs[name] for name in self.program.args]
        except KeyError:
            check_names(own_program(self.program), inputs)
            raise

    def _with_lse(self, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
        check_lse(self.program)
        return out, lse

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, return_lse: bool = False,
        dropout: float = 0.0, seed: int | Tensor | None = None, plans: Mapping[str, Tensor] | None = None,
        return_observed: bool = False, scales: tuple[Tensor | None, ...] | None = None, **inputs: Any,
    ) -> Any:  # fmt: skip
        """The oracle: what a call means, dense, in float64, written straight from the typed program. Slow.

        With dropout a seed must be given. What `return_observed` returns is that of probabilities without dropout.
        """
        from attndsl.runtime.dropout import known
        from attndsl.runtime.reference import reference
        from attndsl.runtime.reference_observe import observed
        from attndsl.runtime.reference_plans import oracle_plans, scaled

        check_names(own_program(self.program), inputs)
        tensors = {name: inputs[name] for name in self._inputs}
        args = arguments(self.program, inputs)
        q, k, v = scaled(q, k, v, scales)
        tensors |= oracle_plans(self.program, q, k, tensors, args, scale, plans or {})
        found = reference(self.program, q, k, v, tensors, args, scale, return_lse, known(dropout, seed, q.device))
        if not return_observed:
            return found
        seen = observed(self.program, q, k, v, tensors, args, scale)
        return (*found, seen) if return_lse else (found, seen)

    # -------------------------------------------------------------------------------- inspection

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that questions are asked of: patterns over raw tokens or over a view. An only part of no
        name is ""."""
        return tuple(parts_of(self.program))

    def mask(
        self, q_len: int, k_len: int, heads: int = 1, kv_heads: int = 1, *, batch: int = 0, part: str | None = None,
        **inputs: Any,
    ) -> NDArray[np.bool_]:  # fmt: skip
        """Which pairs are allowed, by the oracle: bool numpy [heads, q_len, k_len] of one batch entry.

        >>> import attndsl
        >>> attndsl.compile("causal & window(2)").mask(3, 3).astype(int)
        array([[[1, 0, 0],
                [1, 1, 0],
                [0, 1, 1]]])

        q_len: rows of the call, the last ones of k_len positions (the first, under `align start`).
        inputs: what the pattern reads, as tensors or arrays of the declared shapes. batch: which entry of them. What a
        selection chooses is given by its name, as `plan` returns it.
        part: of several, see `parts`; over a view, the entries stand in the place of keys.
        Raises `PatternError` when an input is missing or does not fit.
        """
        from attndsl import oracle

        program, (arrays, args) = part_of(self.program, part), known(self.program, inputs)
        entries = batch_of(self.program, arrays)
        if not 0 <= batch < entries:
            raise error("A523", f"there is no batch entry {batch}: the inputs have {entries}", help="count from 0")
        shape = CallShape(entries, heads, kv_heads, q_len, k_len, 64, 64)
        found: NDArray[np.bool_] = asked(lambda: oracle.mask(program, checked(shape), arrays, args)[batch])
        return found

    def blocks(
        self, q_len: int, k_len: int, block_q: int = 128, block_k: int = 128, heads: int = 1, kv_heads: int = 1, *,
        part: str | None = None, **inputs: Any,
    ) -> BlockGraph:  # fmt: skip
        """Which tiles of keys each tile of queries visits: counts, density, runs, analyses, pictures.

        >>> import attndsl
        >>> attndsl.compile("causal & window(256)").blocks(4096, 4096).density
        0.0908203125

        inputs: those that decide tiles (read at b, h, g, not at q or k) and runtime arguments; others may be left out.
        part: as in `mask`.
        """
        from attndsl.blockgraph import block_graph

        program, (arrays, args) = part_of(self.program, part), known(self.program, inputs)
        shape = CallShape(batch_of(self.program, arrays), heads, kv_heads, q_len, k_len, 64, 64)
        return asked(lambda: block_graph(program, checked(shape), block_q, block_k, arrays, args))

    def pieces(
        self, q_len: int, k_len: int, block_q: int = 128, block_k: int = 128, heads: int = 1, kv_heads: int = 1, *,
        part: str | None = None, **inputs: Any,
    ) -> tuple[PieceTiles, ...]:  # fmt: skip
        """The pieces in which a call visits the pattern, each in its own order of tokens, and how many tiles each has.

        >>> import attndsl
        >>> [(piece.layout, piece.tiles) for piece in attndsl.compile("dilated(16)").pieces(4096, 4096)]
        [('queries and keys 1 of every 16, from residue on', 64)]

        `blocks` shows the tiles of tokens in order. part, inputs: as there; a part over a view is one piece.
        """
        from attndsl.piece_tiles import count_pieces

        program, (arrays, args) = part_of(self.program, part), known(self.program, inputs)
        shape = CallShape(batch_of(self.program, arrays), heads, kv_heads, q_len, k_len, 64, 64)
        return asked(lambda: count_pieces(program, checked(shape), block_q, block_k, arrays, args))

    def kernels(self, heads: int = 8, kv_heads: int | None = None) -> tuple[str, ...]:
        """Names of the kernels that `source` and `assembly` show, in the order in which calls run them.

        >>> import attndsl
        >>> attndsl.compile("causal & (window(128) | dilated(128))").kernels()
        ('forward', 'forward_2', 'dq', 'dkdv', 'dq_2', 'dkdv_2', 'decode')

        A branch has one for each piece and each part; those of a named branch begin with its name. Before them stand
        those that pool views and choose (where torch operators choose there is none), and last those that combine.
        """
        from attndsl.kernel_names import kernel_names

        return kernel_names(self.program, heads, heads if kv_heads is None else kv_heads)

    def source(
        self, kernel: str = "forward", target: str = "sm_90", backend: str = "triton", *,
        heads: int = 8, kv_heads: int | None = None, dim: int = 128, v_dim: int | None = None,
        dtype: str = "bfloat16", rows: int = 1, page: int | None = None,
    ) -> str:  # fmt: skip
        """The generated source text of a kernel, for dense tensors of these sizes. Needs neither GPU nor torch.

        kernel: "forward", "dq" and "dkdv" (gradients; on the CPU one function makes all, and either name shows it), or
            "decode" of `rows` rows over a cache in pages of `page` tokens (None: contiguous). "forward_2" is that of
            the pattern's second piece: see `kernels`.
        target: sm_80, sm_86, sm_89, sm_90, sm_100, gfx90a or gfx942; the CPU backend ignores it.
        backend: "triton", "gluon" (Hopper) or "cpu".
        """
        from attndsl.shown import Shown

        shown = Shown(kernel, target, backend, heads, kv_heads, dim, v_dim, dtype, rows, page)
        return shown.text(shown.plan(self.program))

    def assembly(
        self, kernel: str = "forward", format: str = "ptx", target: str = "sm_90", backend: str = "triton", *,
        heads: int = 8, kv_heads: int | None = None, dim: int = 128, v_dim: int | None = None,
        dtype: str = "bfloat16", rows: int = 1, page: int | None = None,
    ) -> str:  # fmt: skip
        """A kernel compiled for a target that need not be there: "ttir", "ttgir", "llir", and "ptx" or "sass" for
        NVIDIA's, "amdgcn" for AMD's. Other parameters as in `source`.
        """
        from attndsl.runtime.assembly import assembly
        from attndsl.shown import Shown

        shown = Shown(kernel, target, backend, heads, kv_heads, dim, v_dim, dtype, rows, page)
        plan = shown.plan(self.program)
        return assembly(plan, shown.text(plan), format)

    def explain(
        self, q_len: int, k_len: int | None = None, *, batch: int = 1, heads: int = 1, kv_heads: int | None = None,
        dim: int = 128, dtype: str = "bfloat16", target: str = "sm_90", backend: str = "triton",
        row: int | None = None, rates: tuple[float, float] | None = None, stages: bool = False, **inputs: Any,
    ) -> Explanation:  # fmt: skip
        """What was understood, simplified and planned, and what a call should cost. Print it.

        k_len: default q_len. row: the position whose keys are listed (default: three). rates: operations and bytes a
        second that the device reaches (default: its data sheet's). stages: every stage's own result instead.
        inputs: those that are known; what depends on the others is said to.
        """
        from attndsl import explain
        from attndsl.shown import generated, syntax_text
        from attndsl.targets import make_spec

        spec = make_spec(target, backend, heads, heads if kv_heads is None else kv_heads, dim, None, dtype)
        arrays, args = known(self.program, inputs)
        shape = CallShape(
            max(batch, batch_of(self.program, arrays)), spec.heads, spec.kv_heads, q_len,
            q_len if k_len is None else k_len, dim, dim,
        )  # fmt: skip
        text = "" if (source := self.program.source) is None else format_source(source.text, source.name)
        question = explain.Question(self.program, spec, checked(shape), text, self.warnings, arrays, args, row, rates)
        if not stages:
            return asked(lambda: explain.explain(question))
        return explain.stages(question, syntax_text(self.program), generated)


def document_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The document of each token, from where documents begin: what `document(doc)` and `packed doc` read.

    >>> import attndsl, torch
    >>> attndsl.document_ids(torch.tensor([0, 2, 5]), 6)
    tensor([[0, 0, 1, 1, 1, 2]], dtype=torch.int32)

    cu_seqlens: int [documents + 1] or [B, documents + 1], the first token of each document and one past the last
    document's last; tokens from there on are a document of their own. Returns int32 [1 or B, tokens], non-decreasing,
    on the device of the offsets, without waiting for it.
    """
    from attndsl.runtime.cuts import document_ids

    return document_ids(cu_seqlens, tokens)


__all__ = [
    "Attention", "compare", "compile", "document_ids", "format_source", "kernel_cache", "load_attention", "measure",
    "source_of",
]  # fmt: skip
