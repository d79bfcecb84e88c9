"""Mutants of the GPU kernels that nothing can tell from the original: name to the reason, each thought through.

A mutant belongs here only if, in every launch that the launchers allow, results are the same bit for bit and the
emulator's checks have nothing to report; it may cost time or traffic. (Two, at TANH_SMALL and _HALF, may give other
bits, which the functions' stated errors allow as well.)
"""

from __future__ import annotations

__all__ = ["EQUIVALENT"]

_TRAFFIC = "rows that none of the tile's queries sees are read instead of filled with zeros, and masked as before"
_PADDED = "only heads that are no multiple of 16 come here: the two sides are never equal"
_UNUSED_STEP = "what the lanes load for a step that does not exist lies within the stage and is not used"
_ROW_B = "row 0 of the results is some thread's row a, never a row b"
_NO_SINKS = "a pass over no tiles, whose empty partial is not merged"
_OTHER_GROUP = "the scores of a group past the last are made of other numbers of the stage, and never exchanged"
_NO_KEYS = "a split of no keys, whose empty partial nobody reads"
_FULL = "a tile that all rows see whole is masked all the same, which changes nothing"
_EMPTY_TILE = (
    "copies nothing: no key is seen, every row of the tile past the end is zero bytes, and nobody waits or reads"
)
_FLOOR = "without keys the rounded quotient is 0 or less, and so is the number of tiles"
_LAST_TILE = "past Q the next bound, K, holds already: shift is K - Q or K"
_LAST_ROW = (
    "past the end the last row is copied again instead of zeros: what comes of it is masked, has a weight of zero, or"
    " is not stored; and where that row is not finite, neither is anything that a weight of zero would spoil"
)
_NO_BYTES = "an address of which zero bytes are read"
_PROLOGUE = "waits and barriers before the first stage is used find nothing to wait for"

EQUIVALENT: dict[str, str] = {
    # paged attention on tensor cores
    "attention_tiles._load_tile.load_tile: seen == key -> True": _TRAFFIC,
    "attention_tiles._load_tile.load_tile: seen == key -> True (2)": _TRAFFIC,
    "attention_tiles._half_products.load_query: step * 16 + 16 > head_dim -> step * 16 + 16 >= head_dim": _PADDED,
    "attention_tiles._byte_products.multiply_keys: step + 1 == k_steps -> False": _UNUSED_STEP,
    "attention_steps._finish_scores.finish_scores: group < key_groups -> group <= key_groups": _OTHER_GROUP,
    "paged_attention_mma._build_attention.attention: group < key_groups -> group <= key_groups": _OTHER_GROUP,
    "paged_attention_mma._build_attention.attention: sinks > 0 -> sinks >= 0": _NO_SINKS,
    "paged_attention_mma._build_attention.attention: sinks > 0 -> True": _NO_SINKS,
    "paged_attention_mma._build_attention.attention: sinks_here >= 0 -> False": (
        "where there are sinks apart, low_last is above them: no tile of theirs is full"
    ),
    "attention_steps._mask_scores.mask_scores: sinks >= 0 -> sinks > 0": "it is -1 or above 0",
    "attention_steps._write_rows.write_rows: to_b >= 0 -> to_b > 0": _ROW_B,
    "attention_steps._write_rows.write_rows: to_b >= 0 -> to_b > 0 (2)": _ROW_B,
    "attention_partials._build_combine.combine: position >= 0 -> True": (
        "the split of a negative position, rounded down, is below that of position 0 as well"
    ),
    "paged_attention_mma._build_attention.attention: sinks_here >= 0 -> sinks_here > 0": "it is -1 or above 0",
    "paged_attention_mma._build_attention.attention: first_key >= low_last -> first_key > low_last": _FULL,
    "paged_attention_mma._build_attention.attention: i32(first_key + (keys - 1)) <= first_position"
    " -> i32(first_key + (keys - 1)) < first_position": _FULL,
    "paged_attention_mma._build_attention.attention: to_b >= 0 -> to_b > 0": _ROW_B,
    "paged_attention_mma._build_attention.attention: to_b >= 0 -> to_b > 0 (2)": _ROW_B,
    # paged attention in float32
    "paged_attention_f32._first_key: max(position, _i32(0)) -> position": "lowest_key does the same",
    "paged_attention_f32._build_attention.attention: sinks > 0 -> sinks >= 0": _NO_SINKS,
    "paged_attention_f32._build_attention.attention: sinks > 0 -> True": _NO_SINKS,
    "paged_attention_f32._build_attention.attention: split_low <= last_position -> True": _NO_KEYS,
    "paged_attention_f32._build_attention.attention: split_high >= _first_key(first_position, window, sinks)"
    " -> True": _NO_KEYS,
    "paged_attention_f32._build_attention.attention: next_key <= at_high -> True": (
        "past the last tile nothing but zeros is copied, and waited for before the place is used again"
    ),
    "paged_attention_f32._build_attention.attention: first_key >= full_low -> first_key > full_low": _FULL,
    "paged_attention_f32._build_attention.attention: next_key - 1 <= full_high -> next_key - 1 < full_high": _FULL,
    # attention with scores in memory
    "naive_attention._copy_rows: row < count -> row <= count (2)": _NO_BYTES,
    "naive_attention._copy_rows: row < count -> True (2)": _NO_BYTES,
    "naive_attention._copy_rows: columns % 32 != 0 -> True": "then no thread has tx < 0, the condition beside it",
    # dense attention
    "flash_attention._build_forward_f32.flash_attention_f32: min(i32(q0 + rows), Q) -> i32(q0 + rows)": _LAST_TILE,
    "flash_attention._build_forward_f32.flash_attention_f32: keys > 0 -> keys >= 0": _FLOOR,
    "flash_attention._build_forward_f32.flash_attention_f32: keys > 0 -> True": _FLOOR,
    "flash_attention._build_forward_f32.flash_attention_f32: num_tiles > 0 -> num_tiles >= 0": _EMPTY_TILE,
    "flash_attention._build_forward_f32.flash_attention_f32: num_tiles > 0 -> True": _EMPTY_TILE,
    "flash_attention_tiles.tile_copier.copy: r < end -> r <= end": _LAST_ROW,
    "flash_attention_tiles.tile_copier.copy: r < end -> True": _LAST_ROW,
    "flash_attention_tiles.tile_copier.copy: min(r, i32(end - 1)) -> r": _NO_BYTES,
    "flash_attention_mma._build_forward_mma.flash_attention_mma: min(i32(q0 + rows), Q) -> i32(q0 + rows)": _LAST_TILE,
    "flash_attention_mma._build_forward_mma.flash_attention_mma: keys > 0 -> keys >= 0": _FLOOR,
    "flash_attention_mma._build_forward_mma.flash_attention_mma: keys > 0 -> True": _FLOOR,
    "flash_attention_mma._build_forward_mma.flash_attention_mma: num_tiles > 0 -> num_tiles >= 0": _EMPTY_TILE,
    "flash_attention_mma._build_forward_mma.flash_attention_mma: num_tiles > 0 -> True": _EMPTY_TILE,
    "flash_attention_mma._build_forward_mma.flash_attention_mma: k0 + columns > min(K, i32(q0 + shift + 1))"
    " -> k0 + columns >= min(K, i32(q0 + shift + 1))": _FULL,
    "flash_attention_mma._build_forward_mma.flash_attention_mma: k0 + columns > min(K, i32(q0 + shift + 1)) -> True": (
        _FULL
    ),
    "flash_attention_backward_f32._build_dq_f32.flash_attention_dq_f32: min(i32(q0 + rows), Q) -> i32(q0 + rows)": (
        _LAST_TILE
    ),
    "flash_attention_backward_f32._build_dq_f32.flash_attention_dq_f32: keys > 0 -> keys >= 0": _FLOOR,
    "flash_attention_backward_f32._build_dq_f32.flash_attention_dq_f32: keys > 0 -> True": _FLOOR,
    "flash_attention_backward_f32._build_dq_f32.flash_attention_dq_f32: num_tiles > 0 -> num_tiles >= 0": _EMPTY_TILE,
    "flash_attention_backward_f32._build_dq_f32.flash_attention_dq_f32: num_tiles > 0 -> True": _EMPTY_TILE,
    "flash_attention_backward_mma._build_dq_mma.flash_attention_dq_mma: min(i32(q0 + rows), Q) -> i32(q0 + rows)": (
        _LAST_TILE
    ),
    "flash_attention_backward_mma._build_dq_mma.flash_attention_dq_mma: keys > 0 -> keys >= 0": _FLOOR,
    "flash_attention_backward_mma._build_dq_mma.flash_attention_dq_mma: keys > 0 -> True": _FLOOR,
    "flash_attention_backward_mma._build_dq_mma.flash_attention_dq_mma: num_tiles > 0 -> num_tiles >= 0": _EMPTY_TILE,
    "flash_attention_backward_mma._build_dq_mma.flash_attention_dq_mma: num_tiles > 0 -> True": _EMPTY_TILE,
    "flash_attention_backward_mma._build_dq_mma.flash_attention_dq_mma: k0 + columns > min(K, i32(q0 + shift + 1))"
    " -> k0 + columns >= min(K, i32(q0 + shift + 1))": _FULL,
    "flash_attention_backward_mma._build_dq_mma.flash_attention_dq_mma: k0 + columns > min(K, i32(q0 + shift + 1))"
    " -> True": _FULL,
    "flash_attention_backward_mma._build_dkv_mma.flash_attention_dkv_mma: step > 0 -> step >= 0": _PROLOGUE,
    "flash_attention_backward_mma._build_dkv_mma.flash_attention_dkv_mma: step > 0 -> True": _PROLOGUE,
    "flash_attention_backward_mma._build_dkv_mma.flash_attention_dkv_mma: last_q0 + shift < k0 + rows - 1"
    " -> last_q0 + shift <= k0 + rows - 1": _FULL,
    "flash_attention_backward_mma._build_dkv_mma.flash_attention_dkv_mma: last_q0 + shift < k0 + rows - 1"
    " -> True": _FULL,
    # linear layers
    "linear_activations._power_of_two: largest == 0 -> False": "zeros times 2 ** 126 are zeros",
    "linear_activations._power_of_two: exponent == 255 -> False": (
        "a row with an infinity or NaN gives infinities and NaN, of the same signs, whatever the factor"
    ),
    "linear_decode._build_decode.decode: min(g, i32(tokens - TOKENS * n - 1)) -> g": (
        "lanes past the last token read the zeros that fill the tile up; their sums are dropped as before"
    ),
    "linear_decode._build_decode.decode: count >= 4 -> count > 4": (
        "a whole last slice takes the branch of broken ones, which does the same, one tile after another"
    ),
    "linear_decode._build_decode.decode: output < outputs -> output <= outputs (2)": (
        "a block has more threads than outputs only for one tile of 8 tokens, and there token < tokens says as much"
    ),
    "linear_decode._build_decode.decode: output < outputs -> True (2)": (
        "a block has more threads than outputs only for one tile of 8 tokens, and there token < tokens says as much"
    ),
    "linear_prefill._build_prefill.prefill: column_tile >= 0 -> True": _PROLOGUE,
    "linear_f32._build_prefill.prefill: step >= 0 -> True": _PROLOGUE,
    "linear_f32._build_decode.decode: thread < outputs -> thread <= outputs (2)": "token < tokens says as much",
    "linear_f32._build_decode.decode: thread < outputs -> True (2)": "token < tokens says as much",
    # rows and cache
    "kv_cache_kernels._build_read_kv.read_kv: slot >= 0 -> True": (
        "the scale is used under the same condition, and the compiler moves the load to where it is used"
    ),
    "kv_formats.encode_e4m3: magnitude < E4M3_LEAST_NORMAL -> magnitude <= E4M3_LEAST_NORMAL": (
        "2 ** -6 has the code 8 either way"
    ),
    "special_functions.tanh: y < TANH_SMALL -> y <= TANH_SMALL": "at TANH_SMALL both ways are within the stated error",
    "sampling_noise.log2_exponential: bits >= _HALF -> bits > _HALF": (
        "at 2 ** 63 either way takes u = 1/2, within the stated error"
    ),
    "special_functions.tanh: x > ZERO -> x >= ZERO": "x is not zero there",
}
