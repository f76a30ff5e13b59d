"""How models are read and written: dense and packed checkpoints, which layers are packed, files replaced whole."""
