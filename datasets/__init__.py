"""One file a layout of a data set; data.LAYOUTS names them. `load(root, cfg)` -> {"train", "val",
"test": Split}.

Each takes the folder that the official download unpacks to, knows the variants found in the wild,
and raises UserError with one line when something is off. Rows come in the order of the field's
published code, because the published random masks are drawn in that order.
"""
