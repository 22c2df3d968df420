"""The emoji world: drawings of three hands, styles, captions, the division of roles, and the packaged small CLIP."""
