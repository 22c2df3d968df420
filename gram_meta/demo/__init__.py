"""The emoji world: drawings from three sources, styles, captions, the division of roles, and `gram demo`."""
