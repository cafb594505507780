"""The main job, a small GPT-2 with FLORA and without: `python -m experiments`."""
