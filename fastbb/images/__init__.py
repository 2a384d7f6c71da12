"""From image files to pixels, as the reference processors compute them."""
