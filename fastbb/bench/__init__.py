"""`fastbb bench`: measures backbones, and other ways to run them, honestly."""
