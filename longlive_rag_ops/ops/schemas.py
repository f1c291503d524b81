"""Schemas of the ops: the contract that every engine, the fake implementations and the callers share.

``Tensor(a!)`` marks what an op mutates; nothing else is written, and no output aliases an input. ``run`` and ``count``
are symbolic, because they take a dozen values in a video and each would be compiled for by itself; so are ``bank`` and
``layer``, which a function that all layers share takes as arguments.
"""

SCHEMAS = {
    "topk_retrieve": (
        "(Tensor query, Tensor index, Tensor index_ids, Tensor index_length, Tensor end_frame, int k, *, "
        "int first_frame=0, int recent_exclude=0, Tensor? exclude=None, bool normalized=False, "
        "Tensor? index_scale=None, float? min_score=None, float diversity=0.0, str engine='auto') -> (Tensor, Tensor)"
    ),
    "write_frames": (
        "(Tensor q, Tensor k, Tensor v, Tensor(a!) pool_layer, Tensor(b!) staging, Tensor slots, Tensor staging_rows, "
        "Tensor positions, Tensor rope, int[] rope_split, int[] grid, *, Tensor? q_weight=None, Tensor? k_weight=None, "
        "float eps=1e-06, str engine='auto') -> Tensor"
    ),
    "place_frames": (
        "(Tensor(a!) pool_layer, Tensor slots, Tensor source, Tensor positions, Tensor rope, int[] rope_split, *, "
        "Tensor? k_pages=None, Tensor? v_pages=None, Tensor? k_scale=None, Tensor? v_scale=None, str engine='auto') "
        "-> ()"
    ),
    "window_attend": (
        "(Tensor q, Tensor pool_layer, Tensor? slots=None, *, SymInt? run=None, float? scale=None, "
        "bool return_lse=False, Tensor? shifts=None, Tensor? rope=None, int[]? rope_split=None, Tensor? k_scale=None, "
        "Tensor? v_scale=None, str engine='auto') -> (Tensor, Tensor)"
    ),
    "retrieve_attend": (
        "(Tensor q, Tensor k, Tensor v, Tensor(a!) pool_layer, Tensor(b!) staging, Tensor(c!) window_state, "
        "Tensor index, Tensor index_ids, Tensor index_length, Tensor frame_slot, Tensor start_frame, Tensor rope, "
        "int[] rope_split, int[] grid, *, int sink, int top_k, int recent_exclude, bool select, bool place, "
        "SymInt? count=None, Tensor? q_weight=None, Tensor? k_weight=None, float eps=1e-06, float? scale=None, "
        "str position_rule='slot', bool index_normalized=False, bool return_lse=False, Tensor? index_scale=None, "
        "float? min_score=None, float diversity=0.0, str engine='auto') "
        "-> (Tensor, Tensor)"
    ),
    "merge_attention": "(Tensor outs, Tensor lses, *, str engine='auto') -> (Tensor, Tensor)",
    "wait_pages": "(Tensor(a!) pool_layer, SymInt bank, SymInt layer) -> ()",
}
