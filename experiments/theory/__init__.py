"""The paper's figures and examples of smoothness and of two learning rates; see __main__.py."""
