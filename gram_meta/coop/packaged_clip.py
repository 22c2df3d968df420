"""A checkout's own trainers can be tried on the packaged CLIP (hook `packaged-clip`).

CoOp's trainers ask the `clip` of their checkout: `clip._MODELS[name]` is an address, `clip._download(address)` the
path of a file. With this hook the two answer for `gram-small`, which needs no download.
"""

import sys
import tempfile
from functools import cache
from typing import Any

from gram_meta import hooks
from gram_meta.backbone.packaged import NAME, load_packaged_state_dict


def offer_packaged_clip() -> None:
    """Let the `clip.clip` that was imported know `gram-small`; a second call changes nothing."""
    clip: Any = sys.modules.get("clip.clip")
    if not hooks.is_on("packaged-clip") or NAME in getattr(clip, "_MODELS", {NAME: ""}):
        return
    clip._MODELS[NAME] = NAME
    download = clip._download

    def find(address: str, *args: Any, **kwargs: Any) -> str:
        return _weights_file().name if address == NAME else download(address, *args, **kwargs)

    clip._download = find


@cache
def _weights_file() -> Any:
    """Return a file with the full state dict, as torch saves one; it is removed when the process ends."""
    import torch

    file = tempfile.NamedTemporaryFile(prefix=f"{NAME}-", suffix=".pt")  # noqa: SIM115, open until the process ends
    torch.save(load_packaged_state_dict(), file)
    file.flush()
    return file
