"""One file a layout; data.LAYOUTS names them. load(root, cfg) -> {"train", "val", "test": Split}.

Each takes the folder that the official download unpacks to and raises UserError with one line when
something is off. Rows come in the order of the field's published code: the masks are drawn in it.
"""
