"""Kernels with one bug for each value of BUG; BUG="" is right.

test_canaries.py checks that the harness catches every bug.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# triton types reductions as tuples and constants as constexpr

import triton
import triton.language as tl


@triton.jit
def _linear_kernel(
    x_ptr,  # [n_rows, depth], a view
    weight_ptr,  # [depth, n_cols]
    bias_ptr,  # [n_cols]
    y_ptr,  # [n_rows, n_cols]
    n_rows,
    n_cols,
    depth,
    stride_x_row,
    PRECISION: tl.constexpr,
    BUG: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = (rows < n_rows)[:, None], (cols < n_cols)[None, :]
    if BUG == "wrong_stride_on_a_view":
        stride_x_row = depth
    ACC: tl.constexpr = tl.bfloat16 if BUG == "bf16_accumulator" else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_pointers = x_ptr + rows[:, None] * stride_x_row + k[None, :]
        x_mask = row_mask & (k < depth)[None, :]
        if BUG == "dropped_mask":
            x = tl.load(x_pointers, mask=(k < depth)[None, :], other=0.0)
        elif BUG == "missing_other":
            x = tl.load(x_pointers, mask=x_mask)
        else:
            x = tl.load(x_pointers, mask=x_mask, other=0.0)
        weight = tl.load(
            weight_ptr + k[:, None] * n_cols + cols[None, :],
            mask=(k < depth)[:, None] & col_mask,
            other=0.0,
        )
        if BUG == "tf32_where_ieee_was_asked":
            product = tl.dot(x, weight)
        else:
            product = tl.dot(x, weight, input_precision=PRECISION)
        acc += product.to(ACC)
    bias_mask = cols < n_cols
    if BUG == "bias_read_past_its_end":
        bias_mask = cols < n_cols + 1
    acc += tl.load(bias_ptr + cols, mask=bias_mask, other=0.0).to(ACC)[None, :]
    y = acc.to(y_ptr.dtype.element_ty)
    y_pointers = y_ptr + rows[:, None] * n_cols + cols[None, :]
    if BUG == "one_row_too_many":
        row_mask = (rows < n_rows + 1)[:, None]
    if BUG == "missing_last_row":
        row_mask = (rows < n_rows - 1)[:, None]
    tl.store(y_pointers, y, mask=row_mask & col_mask)
    if BUG == "written_twice":
        tl.store(y_pointers, y, mask=row_mask & col_mask)


@triton.jit
def _scale_kernel(x_ptr, y_ptr, scale, BUG: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    y = tl.load(x_ptr + i) * scale
    if BUG == "truncating_cast":
        bits = y.to(tl.int32, bitcast=True) >> 16
        rounded = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = y.to(tl.bfloat16)
    if BUG == "written_twice_in_one_store":
        i = i // 2 * 2
    tl.store(y_ptr + i, rounded)


@triton.jit
def _column_sum_kernel(x_ptr, y_ptr, BUG: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + tl.program_id(0) * N + i)
    if BUG == "race_between_programs":
        tl.store(y_ptr + i, tl.load(y_ptr + i) + x)
    else:
        tl.atomic_add(y_ptr + i, x)


@triton.jit
def _normalize_in_place_kernel(x_ptr, BUG: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, N)
    source = row
    if BUG == "race_in_place":
        # as a cyclic shift would
        source = (row + 1) % tl.num_programs(0)
    x = tl.load(x_ptr + source * N + i)
    x -= tl.sum(x, 0) / N
    tl.store(x_ptr + row * N + i, x * tl.rsqrt(tl.sum(x * x, 0) / N + 1e-5))


@triton.jit
def _reverse_kernel(x_ptr, scratch_ptr, y_ptr, BUG: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(scratch_ptr + i, tl.load(x_ptr + i))
    if BUG != "missing_barrier":
        tl.debug_barrier()
    tl.store(y_ptr + i, tl.load(scratch_ptr + N - 1 - i))


@triton.jit
def _copy_rows_kernel(x_ptr, y_ptr, stride_row, BUG: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0)
    if BUG != "int32_overflow_of_an_offset":
        row = row.to(tl.int64)
    offsets = row * stride_row + tl.arange(0, N)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets))


@triton.jit
def _window_attention_kernel(
    qkv_ptr,  # [n_rows, n_cols, 3, N_HEADS, HEAD_DIM]
    bias_ptr,  # [3, N_HEADS, HEAD_DIM]: what a padded token is
    y_ptr,  # [n_rows, n_cols, N_HEADS, HEAD_DIM]
    n_rows,
    n_cols,
    shift,
    scale,
    BUG: tl.constexpr,
    N_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
):
    window, head = tl.program_id(0), tl.program_id(1)
    height, width = tl.cdiv(n_rows, WINDOW) * WINDOW, tl.cdiv(n_cols, WINDOW) * WINDOW
    token, dim = tl.arange(0, WINDOW * WINDOW), tl.arange(0, HEAD_DIM)
    shifted_row = window // (width // WINDOW) * WINDOW + token // WINDOW
    shifted_col = window % (width // WINDOW) * WINDOW + token % WINDOW
    row, col = (shifted_row + shift) % height, (shifted_col + shift) % width
    is_pixel = (row < n_rows) & (col < n_cols)

    WIDTH: tl.constexpr = N_HEADS * HEAD_DIM
    channel = head * HEAD_DIM + dim[None, :]
    pointers = qkv_ptr + (row * n_cols + col)[:, None] * 3 * WIDTH + channel
    mask = is_pixel[:, None]
    q = tl.load(pointers, mask=mask, other=0.0)
    k = tl.load(pointers + WIDTH, mask=mask, other=0.0)
    v = tl.load(pointers + 2 * WIDTH, mask=mask, other=0.0)
    q = tl.where(mask, q, tl.load(bias_ptr + channel))
    k = tl.where(mask, k, tl.load(bias_ptr + WIDTH + channel))
    v = tl.where(mask, v, tl.load(bias_ptr + 2 * WIDTH + channel))

    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if BUG == "mask_region_on_unshifted_coordinates":
        shifted_row, shifted_col = row, col
    region_row = (shifted_row >= height - WINDOW).to(tl.int32) + (shifted_row >= height - shift)
    region_col = (shifted_col >= width - WINDOW).to(tl.int32) + (shifted_col >= width - shift)
    region = region_row * 3 + region_col
    others = region[:, None] != region[None, :]
    if BUG == "mask_as_minus_inf":
        scores = tl.where(others, float("-inf"), scores)
    else:
        scores = tl.where(others, scores - 100.0, scores)
    if BUG == "pads_masked_out":
        scores = tl.where(is_pixel[None, :], scores, float("-inf"))
    p = tl.exp(scores - tl.max(scores, 1)[:, None])
    y = tl.dot(p, v, input_precision="ieee") / tl.sum(p, 1)[:, None]
    tl.store(y_ptr + (row * n_cols + col)[:, None] * WIDTH + channel, y, mask=mask)
