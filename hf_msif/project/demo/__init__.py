"""The demo: the main job on generated data, with nothing to download."""
