"""Addresses of the tokens of a Swin window in the map, from shift, padding and partition.

The map [H, W] is padded to whole windows and rolled up and left by the shift (or rolled, then
padded) before it is cut. That map is never stored: each token's pixel is computed.
"""
# pyright: reportArgumentType=false
# inside a kernel values are tensors, which the annotations of tl do not allow everywhere

import triton
import triton.language as tl


@triton.jit
def window_tokens(
    window,
    tokens,
    height,
    width,
    shift_h,
    shift_w,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDED: tl.constexpr,
    ROLL_FIRST: tl.constexpr,
):
    """Finds the pixels of tokens of one window of a batch of maps.

    Args:
        window: number of the window, counted over images, then rows and columns of windows; i32.
        tokens: [T] i32, token numbers, row by row inside the window. Numbers from
            WINDOW_H * WINDOW_W on are not tokens.
        height, width: of the map, without padding; i32.
        shift_h, shift_w: tokens by which the map is rolled, at least 0 and below the window; i32.
        WINDOW_H, WINDOW_W: tokens per window.
        SHIFTED: whether a shift is not 0. If False, the shifts are not read and `region` is 0.
        PADDED: whether the map is not a multiple of the window. If False, no token is padding.
        ROLL_FIRST: roll before padding, as timm does, instead of after it.

    Returns:
        image: number of the image; i64.
        y, x: [T] i32, pixel of the token in its image. Row of a flattened batch, in i64:
            (image * height + y) * width + x.
        inside: [T] i1, whether the token exists and is a pixel, which may be loaded and stored. The
            others of the first WINDOW_H * WINDOW_W tokens are padding; they are keys and values.
        region: [T] i32; two tokens of the window with different regions were not neighbours before
            the roll, and the mask separates them. All are equal if `has_regions` is False.
    """
    image, window_y, window_x = _window_position(window, height, width, WINDOW_H, WINDOW_W)
    token_y, token_x = tokens // WINDOW_W, tokens % WINDOW_W
    y, inside_h = _unroll(
        window_y * WINDOW_H + token_y, height, shift_h, WINDOW_H, SHIFTED, PADDED, ROLL_FIRST
    )
    x, inside_w = _unroll(
        window_x * WINDOW_W + token_x, width, shift_w, WINDOW_W, SHIFTED, PADDED, ROLL_FIRST
    )
    inside = tokens < WINDOW_H * WINDOW_W
    if PADDED:
        inside = inside & inside_h & inside_w
    region = tokens * 0
    if SHIFTED:
        # the roll moved the first `shift` rows and columns to the end of the padded map
        last_y = window_y == tl.cdiv(height, WINDOW_H) - 1
        last_x = window_x == tl.cdiv(width, WINDOW_W) - 1
        below = tokens >= tl.where(last_y, WINDOW_H - shift_h, WINDOW_H) * WINDOW_W
        right = token_x >= tl.where(last_x, WINDOW_W - shift_w, WINDOW_W)
        region = 2 * below.to(tl.int32) + right.to(tl.int32)
    return image, y, x, inside, region


@triton.jit
def has_regions(window, height, width, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """Whether tokens of a window may differ in `region`: only in the map's last windows.

    A kernel branches on it, because most windows need no mask. Arguments as in `window_tokens`.
    """
    _, window_y, window_x = _window_position(window, height, width, WINDOW_H, WINDOW_W)
    last_y = window_y == tl.cdiv(height, WINDOW_H) - 1
    last_x = window_x == tl.cdiv(width, WINDOW_W) - 1
    return last_y | last_x


@triton.jit
def _window_position(window, height, width, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """Returns image (i64), row and column of a window, numbered over a batch of maps."""
    n_cols = tl.cdiv(width, WINDOW_W)
    n_windows = tl.cdiv(height, WINDOW_H) * n_cols  # of one image
    window_of_image = window % n_windows
    return (window // n_windows).to(tl.int64), window_of_image // n_cols, window_of_image % n_cols


@triton.jit
def _unroll(
    position,
    size,
    shift,
    WINDOW: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDED: tl.constexpr,
    ROLL_FIRST: tl.constexpr,
):
    """Returns a position's pixel along one axis of the rolled, padded map, and if it exists."""
    rolled_size = size
    if PADDED and not ROLL_FIRST:
        rolled_size = tl.cdiv(size, WINDOW) * WINDOW
    inside = position < rolled_size
    if SHIFTED:
        position += shift % rolled_size  # timm rolls maps smaller than the shift
        position = tl.where(position >= rolled_size, position - rolled_size, position)
    return position, inside & (position < size)
