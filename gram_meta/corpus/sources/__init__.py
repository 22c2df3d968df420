"""The formats that image-text pairs come in; `source` opens any of them."""
