"""Curvature operators: products with a matrix that stands for the Hessian, one operator a file."""
