"""Commands that measure and check: verify, tune, warm-up, doctor, view."""
