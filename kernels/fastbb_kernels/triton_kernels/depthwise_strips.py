"""The sums of a depthwise convolution for vertical strips of pixels of a channels-last map."""
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# inside a kernel values are tensors, and static_range has no iterable type

import triton
import triton.language as tl


@triton.jit
def strip_sums(
    acc,
    x_pointers,
    weight_pointers,
    mask,
    first_pixels,
    shape,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds the products of all taps to the sums of strips of ROWS results.

    One load of a pixel serves all vertically adjacent taps of a strip. Horizontally adjacent taps
    and strips read the pixel from L1.

    Args:
        acc: tuple of ROWS sums [N, C] fp32 of the results of a strip, from the top.
        x_pointers: [N, C], to the center pixels of the first results.
        weight_pointers: [N, C], to the first tap of [K, K, channels]; as many as pointers to x, so
            that each thread loads its own factors.
        mask: whether there is such a strip and channel; broadcasts to [N, C].
        first_pixels: row and column [N, 1] i32 of the center pixels of the first results.
        shape: height, width and channels of the map.
        STRIDE: of the convolution.
        DILATION: of the convolution.
        K: taps in each direction.
        ROWS: results of a strip.

    Returns:
        tuple of ROWS sums [N, C] fp32.
    """
    rows, cols = first_pixels
    height, width, channels = shape
    wide_channels = tl.cast(channels, tl.int64)
    # a loop: 5x5 spills if the loads of all columns are in flight at once
    for kw in range(K):
        col = (kw - K // 2) * DILATION
        col_mask = mask & (cols + col >= 0) & (cols + col < width)
        for kh in tl.static_range(K):
            tap_pointers = weight_pointers + (kh * K + kw) * channels
            weight = tl.load(tap_pointers, mask=mask, other=0.0).to(tl.float32)
            sums = ()
            for i in tl.static_range(ROWS):
                # the compiler merges this with equal loads of other taps
                row = i * STRIDE + (kh - K // 2) * DILATION
                x = tl.load(
                    x_pointers + (row * width + col) * wide_channels,
                    mask=col_mask & (rows + row >= 0) & (rows + row < height),
                    other=0.0,
                )
                sums += (acc[i] + x.to(tl.float32) * weight,)
            acc = sums
    return acc
