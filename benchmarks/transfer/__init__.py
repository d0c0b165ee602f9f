"""Exchanging models without training, beside NVFlare's own recipe."""
