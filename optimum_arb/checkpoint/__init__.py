"""Models as files: what binarizing one will cost, before anything runs."""
