"""Convolution kernels with one bug for each value of BUG; BUG="" is right.

They extend buggy_kernels.py with bugs at borders, strides and batch norms; see
test_conv_canaries.py.
"""
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# triton types constants as constexpr, and static_range as no iterable

import triton
import triton.language as tl


@triton.jit
def _conv_kernel(
    x_ptr,  # [height, width, IN_CHANNELS]
    weight_ptr,  # [3, 3, IN_CHANNELS, CHANNELS]
    norm_weight_ptr,  # [CHANNELS], as the three below
    norm_bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    residual_ptr,  # [y_height, y_width, CHANNELS]
    y_ptr,  # [y_height, y_width, CHANNELS]
    height,
    width,
    eps,
    STRIDE: tl.constexpr,
    BUG: tl.constexpr,
    IN_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    y_height, y_width = tl.cdiv(height, STRIDE), tl.cdiv(width, STRIDE)
    if BUG == "width_rounded_down":
        y_width = width // STRIDE
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y_row, y_col = pixel // y_width, pixel % y_width
    mask = (y_row < y_height)[:, None]
    k, channel = tl.arange(0, IN_CHANNELS), tl.arange(0, CHANNELS)[None, :]
    acc = tl.zeros((BLOCK, CHANNELS), tl.float32)
    for tap in tl.static_range(9):
        row, col = y_row * STRIDE + tap // 3 - 1, y_col * STRIDE + tap % 3 - 1
        if BUG == "pixel_after_the_strided_one":
            row, col = row + STRIDE - 1, col + STRIDE - 1
        inside = (row >= 0) & (row < height) & (col >= 0) & (col < width)
        if BUG == "no_left_border":
            inside = (row >= 0) & (row < height) & (row * width + col >= 0) & (col < width)
        x = tl.load(
            x_ptr + (row * width + col)[:, None] * IN_CHANNELS + k[None, :],
            mask=mask & inside[:, None],
            other=0.0,
        )
        weight = tl.load(weight_ptr + (tap * IN_CHANNELS + k)[:, None] * CHANNELS + channel)
        acc = tl.dot(x, weight, acc, input_precision="ieee")

    if BUG == "fixed_eps":
        eps = 1e-5
    rstd = tl.rsqrt(tl.load(running_var_ptr + channel) + eps)
    scale = tl.load(norm_weight_ptr + channel) * rstd
    acc = (acc - tl.load(running_mean_ptr + channel)) * scale + tl.load(norm_bias_ptr + channel)
    pointers = pixel[:, None] * CHANNELS + channel
    residual = tl.load(residual_ptr + pointers, mask=mask, other=0.0)
    if BUG == "residual_after_the_activation":
        y = tl.maximum(acc, 0.0) + residual
    else:
        y = tl.maximum(acc + residual, 0.0)
    tl.store(y_ptr + pointers, y, mask=mask)


@triton.jit
def _stem_kernel(
    image_ptr,  # [3, height, width], uint8
    mean_ptr,  # [3]
    std_ptr,  # [3]
    weight_ptr,  # [3, 3, 3, CHANNELS]: color, row, column, channel
    y_ptr,  # [height, width, CHANNELS]
    height,
    width,
    BUG: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixel, channel = tl.arange(0, BLOCK), tl.arange(0, CHANNELS)[None, :]
    mask = pixel < height * width
    acc = tl.zeros((BLOCK, CHANNELS), tl.float32)
    for color in tl.static_range(3):
        mean, std = tl.load(mean_ptr + color), tl.load(std_ptr + color)
        for tap in tl.static_range(9):
            row, col = pixel // width + tap // 3 - 1, pixel % width + tap % 3 - 1
            inside = mask & (row >= 0) & (row < height) & (col >= 0) & (col < width)
            pointers = image_ptr + (color * height + row) * width + col
            x = (tl.load(pointers, mask=inside, other=0).to(tl.float32) - mean) / std
            if BUG != "padded_before_the_normalization":
                x = tl.where(inside, x, 0.0)
            weight = tl.load(weight_ptr + (color * 9 + tap) * CHANNELS + channel)
            acc += x[:, None] * weight
    tl.store(y_ptr + pixel[:, None] * CHANNELS + channel, acc, mask=mask[:, None])


@triton.jit
def _max_pool_kernel(
    x_ptr,  # [height, width]
    y_ptr,  # [y_height, y_width]: windows of 3x3, stride 2, padding 1
    height,
    width,
    BUG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    y_height, y_width = (height + 1) // 2, (width + 1) // 2
    pixel = tl.arange(0, BLOCK)
    mask = pixel < y_height * y_width
    y = tl.full((BLOCK,), float("-inf"), tl.float32)
    for tap in tl.static_range(9):
        row, col = pixel // y_width * 2 + tap // 3 - 1, pixel % y_width * 2 + tap % 3 - 1
        inside = (row >= 0) & (row < height) & (col >= 0) & (col < width)
        if BUG == "window_reaches_the_next_row":
            inside = (row * width + col >= 0) & (row * width + col < height * width)
        other = 0.0 if BUG == "window_padded_with_zeros" else float("-inf")
        x = tl.load(x_ptr + row * width + col, mask=mask & inside, other=other)
        y = tl.maximum(y, x)
    tl.store(y_ptr + pixel, y, mask=mask)
