"""The old path of `gram_meta.method.apply` and `gram_meta.method.dassl`; it works until version 0.3."""

from gram_meta._moved import moved

moved(__name__, "gram_meta.method.apply", "gram_meta.method.dassl")
