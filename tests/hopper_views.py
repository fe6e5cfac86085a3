"""Programs of views on Hopper: on a GPU beside the oracle, and elsewhere which kernels their parts have."""

from __future__ import annotations

# Parts over entries, with raw tokens before them or alone. Which kernels each has: one a part.
VIEWS = {
    "attend causal over pool(mean, 64)": "g",
    "attend all over pool(mean, 5, counted) { score softcap(s, 2.0) * (1 + sinks[h]) }": "g",
    "attend causal over pool(sum, 3, visible = any) { softmax with sink sinks[h] }": "g",
    "attend { b < 1 and k <= q + h } over pool(max, 4, 2)": "g",
    "attend causal & window(100), causal over pool(mean, 4) { weights sigmoid(s) }": "gg",
    "attend causal & { q // 16 - k // 16 < 4 }, { 4 <= q // 16 - k // 16 < 16 } over pool(mean, 4, counted), "
    "{ 16 <= q // 16 - k // 16 } over pool(mean, 16, counted) { softmax with sink 0.25 }": "ggg",
    "attend causal & { q // 4 - k // 4 < 64 }, { q // 4 - k // 4 >= 64 } over given(kc, vc, 4)": "gg",
    "attend causal & document(doc), causal & { q >= doc[q] } over pool(mean, 4)": "gg",
    "attend causal & dilated(4), causal over pool(mean, 4)": "tg",
    "plan sel = top(2, blocks(64), by = dot(Q, mean(K)), always = same_block(64), among = causal)\n"
    "attend causal & sel, causal - sel over pool(mean, 64, counted)": "tg",
    "attend causal over pool(mean, 32) from pool(mean, 32)": "g",
}
VIEW_INPUTS = {
    "sinks": "float[h]",
    "doc": "int[b, k] sorted",
    "kc": "float[b, g, k/4, D]",
    "vc": "float[b, g, k/4, Dv]",
}


def of_views(body: str) -> str:
    declared = "".join(f"input {name} : {kind}\n" for name, kind in VIEW_INPUTS.items() if f"{name}[" in body)
    given = "".join(f"input {name} : {VIEW_INPUTS[name]}\n" for name in ("kc", "vc") if f"{name}," in body)
    return f"attention a {{\n{declared}{given}{body}\n}}"
