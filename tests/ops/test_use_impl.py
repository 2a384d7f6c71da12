"""`use_impl`: blocks nest, and blocks of several threads restore the implementation."""

import threading

import pytest

from fastbb_kernels import use_impl
from fastbb_kernels._dispatch import Impl, chosen_impl


def test_innermost_use_impl_block_wins() -> None:
    with use_impl("eager"):
        with use_impl("triton"), use_impl("eager", ops=["patch_embed"]):
            with use_impl("eager"):
                assert chosen_impl("patch_merging", None) == "eager"
            assert chosen_impl("patch_merging", None) == "triton"
            assert chosen_impl("patch_embed", None) == "eager"
            assert chosen_impl("patch_embed", "auto") == "auto"
        assert chosen_impl("patch_merging", None) == chosen_impl("patch_embed", None) == "eager"
    assert chosen_impl("patch_merging", None) == "auto"


def test_use_impl_is_restored_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), use_impl("eager"):
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="impl must be one of"), use_impl("cuda"):  # type: ignore[arg-type]  # on purpose
        pass
    assert chosen_impl("patch_merging", None) == "auto"


def test_overlapping_use_impl_blocks_of_threads_are_restored() -> None:
    """The blocks may be left in either order; neither restores the value that it found."""
    for order in ((0, 1), (1, 0)):
        steps = [[threading.Event(), threading.Event()] for _ in range(2)]

        def run(impl: Impl, entered: threading.Event, leave: threading.Event) -> None:
            with use_impl(impl):
                entered.set()
                leave.wait()

        threads = [
            threading.Thread(target=run, args=(impl, *step))
            for impl, step in zip(("eager", "triton"), steps)
        ]
        for thread, (entered, _) in zip(threads, steps):
            thread.start()
            entered.wait()
        assert chosen_impl("patch_merging", None) == "triton"
        for index in order:
            steps[index][1].set()
            threads[index].join()
        assert chosen_impl("patch_merging", None) == "auto"
