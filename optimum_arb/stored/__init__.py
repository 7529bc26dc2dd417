"""What a binarized model is on disk: read from the headers of its files, checked, sealed with checksums; its report."""
