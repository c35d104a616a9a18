"""Evaluation: how good what a model generates is."""

from .images import ImageFeatures, ImageScore, fid, image_features, inception, kid

__all__ = ["ImageFeatures", "ImageScore", "fid", "image_features", "inception", "kid"]
