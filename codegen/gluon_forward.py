"""The forward kernel for Hopper in Gluon: one warp loads, two warpgroups of consumers compute.

The same plan as the portable kernel: the same runs, mask, scores and sinks, printed by the same printer. The
producer streams tiles of k and v through shared memory by hardware tensor copies; each consumer owns half of the
query tile's rows (`gluon_attend.py`).
"""

from __future__ import annotations

from attndsl.codegen.gluon import IMPORTS, PART, barriers, device_function, helper_functions, specialized
from attndsl.codegen.gluon_attend import Attend, scale_where_grown
from attndsl.codegen.gluon_tiles import Tiles
from attndsl.codegen.head_order import last_beside
from attndsl.codegen.header import header
from attndsl.codegen.kernel import leave_to_another, scalar_parameters, used_parameters
from attndsl.plan import DType, ForwardPlan, Part, head_parts

KERNEL = "attention_forward"
_STAGED = ("k_ready", "k_free", "v_ready", "v_free")
# The last heads whose tiles take turns, where the longest are those of the longest document, wherever it is.
_DOCUMENTS_BESIDE = 8

# A thread has of 16 weights the two pairs that products leave it, and a product of float8 takes four in a row.
_IN_ORDER_OF_VALUES = """\
@gluon.jit
def in_order_of_values(weights):
    \"\"\"The weights of keys in the order in which `values_in_order` lays out values: no thread gets others.\"\"\"
    ROWS: gl.constexpr = weights.shape[0]
    KEYS: gl.constexpr = weights.shape[1]
    pairs = weights.reshape([ROWS, KEYS // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4))
    return pairs.reshape([ROWS, KEYS])


"""


# Programs take numbers from a counter, which every launch finds at zero, and leaves so.
_HANDING_OUT = """\
@gluon.jit
def next_number(counter_ptr, places):
    \"\"\"The number after those that programs took before. A program takes one for each place that it has, so the one
    that takes the last is the last to take one.\"\"\"
    taken = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    if taken == places - 1:
        gl.store(counter_ptr, 0)
    return gl.num_programs(0) + taken


@gluon.jit
def hand(memory, number):
    memory.store(gl.full([1], number, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def handed(memory, WARPS: gl.constexpr):
    return gl.max(memory.load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


"""


def forward_source(plan: ForwardPlan) -> str:
    """Text of a Python file whose `attention_forward` is the plan's kernel for Hopper."""
    helpers: set[str] = set()
    parts = {"load_tiles": _Load(plan, helpers).text(), "attend_rows": Attend(plan, helpers).text()}
    if plan.tiling.several:
        parts |= {"hand_out": _HandOut(plan, helpers).text()}
    q_parts, v_parts = head_parts(plan.spec.dim), head_parts(plan.spec.v_dim)
    descriptors = [f"{x}_desc{part.suffix}" for x in "qk" for part in q_parts]
    descriptors += [f"{x}_desc{part.suffix}" for x in ("v", "out") for part in v_parts]
    strides = [f"stride_out{axis}" for axis in "bhn"]
    uniform = [*(["scale"] if plan.scale is None else []), "rows", "k_len"]
    # Where a table tells the query tiles, only the device knows how many places there are.
    uniform += ["places" if plan.row_tiles is None else "heads", *scalar_parameters(plan)]
    scales = [f"{x}_scale_ptr" for x in "qkv"] + [f"stride_{x}_scale" for x in "qkv"]
    given = [*descriptors, "out_ptr", "lse_ptr", "counter_ptr", *scales, *strides, *uniform]
    shared = [name.replace("_desc", "_smem") for name in descriptors]
    shared += ["handed_smem", "told", "ending", "q_ready", "q_free", *_STAGED]
    # Where a program owns several query tiles, each part finds them by itself.
    place = [] if plan.tiling.several else ["b", "h", "g", "head", "residue", "q_tile"]
    candidates = [*given, *shared, *place]
    takes = {name: used_parameters(candidates, text) for name, text in parts.items()}
    kernel = _Kernel(plan, helpers).text(takes)
    return "".join(
        (
            header(plan, "forward kernel, Gluon for Hopper"),
            IMPORTS,
            helper_functions(helpers),
            _IN_ORDER_OF_VALUES if plan.spec.dtype is DType.FLOAT8 else "",
            _HANDING_OUT if plan.tiling.several else "",
            *(scale_where_grown(part.size) for part in v_parts if plan.softmax),
            *(
                device_function(name, [PART] * (name == "attend_rows") + takes[name], text) + "\n\n"
                for name, text in parts.items()
            ),
            device_function(KERNEL, used_parameters(given, kernel), kernel),
        )
    )


class _Copies(Tiles):
    """What parts that copy have in common."""

    def _copy_queries(self) -> None:
        ready = "q_ready.index(nth % 2)" if self.several else "q_ready"
        self.lines.add(f"mbarrier.expect({ready}, 2 * {self._bytes('q', self.q_parts)})")
        with self.lines.block("for half in gl.static_range(2):"):
            self.lines.add(f"row = {self.row} + half * (BLOCK_Q // 2)")
            self._copy("q", self.q_parts, f"{self.at('q', 'h', 'row')}, {{}}", ready, self.half("half"))

    def _bytes(self, x: str, parts: tuple[Part, ...]) -> str:
        text = " + ".join(f"{x}_desc{part.suffix}.block_type.nbytes" for part in parts)
        return f"({text})" if len(parts) > 1 and x == "q" else text

    def _copy(self, x: str, parts: tuple[Part, ...], at: str, ready: str, place: str) -> None:
        for part in parts:
            self.lines.add(
                f"tma.async_copy_global_to_shared({x}_desc{part.suffix}, [{at.format(part.offset)}], {ready}, "
                f"{x}_smem{part.suffix}.index({place}))"
            )


class _Load(_Copies):
    """The text of the producer."""

    warps = 1

    def text(self) -> str:
        lines = self.lines
        self.constants()
        with self.query_tiles():
            if not self.several:
                self._copy_queries()
            partial, full = self.visits(self.printer())
            lines.add(f"k_tile = {self.visited(partial, full, '0')}")
            with lines.block("for n in range(partial + full):"):
                if self.several:
                    lines.add("mbarrier.arrive(ending, count=1, pred=n == gl.maximum(partial + full - 3, 0))")
                turn = self.turn("n")
                lines.add(f"stage = {self.stage(turn)}", f"phase = {self.phase(turn)}")
                self._copy_keys("k", self.q_parts)
                lines.add(f"next_tile = {self.visited(partial, full, '(n + 1)')}")
                self._copy_keys("v", self.v_parts)
                lines.add("k_tile = next_tile")
        return lines.text()

    def _copy_keys(self, x: str, parts: tuple[Part, ...]) -> None:
        """Copy a tile of keys or of values once its place is free."""
        ready = f"{x}_ready.index(stage)"
        self.lines.add(
            f"mbarrier.wait({x}_free.index(stage), phase ^ 1)",
            f"mbarrier.expect({ready}, {self._bytes(x, parts)})",
        )
        keys = f"{self.at('k', 'g', self.first_key('k_tile'))}, {{}}"
        self._copy(x, parts, "b, g, {}, k_tile * BLOCK_K" if self.fp8 and x == "v" else keys, ready, "stage")


class _HandOut(_Copies):
    """The text of the warp that takes query tiles for a program, a tile ahead of the other parts."""

    def text(self) -> str:
        lines = self.lines
        self.constants()
        self.tiles()
        lines.add(*([] if self.begun else ["heads = places // q_tiles"]), "nth = 0", "number = gl.program_id(0)")
        with lines.block("while number < places:"):
            lines.add("# Heads one after another, the last few side by side: programs in flight share keys.")
            beside = {"beside": _DOCUMENTS_BESIDE} if self.begun else {}
            head, tile = last_beside(lines, "gl", "number", "q_tiles", **beside)
            lines.add(f"place = {head} * q_tiles + {tile}")
            self.place("place")
            if self.begun:
                self.entries("place")
                with lines.block("if q_row < rows:"):
                    self._hand_out("q_row", "q_end")
            else:
                self._hand_out()
            lines.add("number = next_number(counter_ptr, places)")
        self._hand_over("places")
        return lines.text()

    def _hand_out(self, *rows: str) -> None:
        partial, full = self.visits(self.printer())
        self._hand_over("place", *rows, *(end for visits in (partial, full) if visits for end in visits.ends))
        self._copy_queries()
        self.lines.add(
            "# The next one is taken as late as it can be: it may be long, and others are done with theirs.",
            "mbarrier.wait(ending, nth & 1)",
            "nth += 1",
        )

    def _hand_over(self, *numbers: str) -> None:
        """Say which query tile is next, and where its runs end, once there is room for its rows."""
        self.lines.add("mbarrier.wait(q_free.index(nth % 2), ((nth // 2) & 1) ^ 1)")
        self.lines.add(*(f"hand({self.handed_at(n)}, {number})" for n, number in enumerate(numbers)))
        self.lines.add("mbarrier.arrive(told.index(nth % 2), count=1)")


class _Kernel(Tiles):
    """The text of the kernel itself, which gives each part its warps."""

    def text(self, takes: dict[str, list[str]]) -> str:
        lines = self.lines
        leave_to_another(lines, self.printer(), self.plan)
        self.constants()
        if not self.several:
            lines.add(
                "",
                "# Heads one after another: programs in flight share keys. A head's last rows first: they are longest.",
            )
            self.tiles()
            self.place("gl.program_id(0)")
        lines.add("")
        self._memory()
        if self.several:
            size = f"[2 * {self.handed}, 1]"
            lines.add(f"handed_smem = gl.allocate_shared_memory(gl.int32, {size}, mbarrier.MBarrierLayout())")
            lines.add(
                *(
                    f"{x} = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())"
                    for x in ("told", "q_ready", "q_free")
                ),
                *barriers(("ending",), stages=False),
            )
        else:
            lines.add(*barriers(("q_ready",), stages=False))
        lines.add(*barriers(_STAGED, stages=True))
        if self.several:
            lines.add("mbarrier.init(ending, count=1)")
            with lines.block("for place in gl.static_range(2):"):
                lines.add(
                    "mbarrier.init(told.index(place), count=1)",
                    "mbarrier.init(q_ready.index(place), count=1)",
                    "mbarrier.init(q_free.index(place), count=2)",
                )
        else:
            lines.add("mbarrier.init(q_ready, count=1)")
        with lines.block("for stage in gl.static_range(STAGES):"):
            # The producer's copy makes a tile ready; both consumers free it.
            lines.add(*(f"mbarrier.init({x}.index(stage), count={1 if 'ready' in x else 2})" for x in _STAGED))
        others = [(name, takes[name]) for name in takes if name == "hand_out"]
        lines.add(*specialized("attend_rows", takes["attend_rows"], "load_tiles", takes["load_tiles"], *others))
        return lines.text()

    def _memory(self) -> None:
        """Room for both halves of the query tile's rows, twice where a program owns several; and for stages of keys."""
        halves = 4 if self.several else 2
        for x, parts, size in (
            ("q", self.q_parts, f"{halves}, {self.rows('q', 'BLOCK_Q // 2')}"),
            ("k", self.q_parts, f"STAGES, {self.rows('k', 'BLOCK_K')}"),
            ("v", self.v_parts, f"STAGES, {self.rows('k', 'BLOCK_K')}"),
        ):
            for part in parts:
                self._allocate(x, part, size)
        for n, part in enumerate(self.v_parts):
            if self.out_memory(n, part).startswith("out"):
                self._allocate("out", part, f"{halves}, {self.rows('q', 'BLOCK_Q // 2')}")

    def _allocate(self, x: str, part: Part, size: str) -> None:
        desc = f"{x}_desc{part.suffix}"
        sizes = f"STAGES, 1, 1, {part.size}, BLOCK_K" if self.fp8 and x == "v" else f"{size}, {part.size}"
        self.lines.add(f"{x}_smem{part.suffix} = gl.allocate_shared_memory({desc}.dtype, [{sizes}], {desc}.layout)")
