"""Networks of any kind: set-up, training, surgery, saving and loading, FLOPs."""
