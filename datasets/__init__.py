"""One file per layout; data.LAYOUTS names them. load(root, cfg) -> {"train", "val", "test": Split}
takes the folder that the official download unpacks to; UserError says in one line what is off.
Rows come in the order of the field's published code: the masks are drawn in it."""
