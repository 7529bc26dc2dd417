"""Other libraries that run binarized models. Each is imported only where it is used."""
