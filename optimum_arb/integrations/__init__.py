"""What other libraries need to work with binarized models; none of them is a dependency of this package."""
