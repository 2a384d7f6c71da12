"""Image processing: from files to the pixels that the reference processors compute."""
