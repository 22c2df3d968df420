"""The old path of `gram_meta.backbone.packaged`; it works until version 0.3."""

from gram_meta._moved import moved

moved(__name__, "gram_meta.backbone.packaged")
