"""Triton kernels, one op a file, with the functions that launch them beside them.

This folder is installed as ``longlive_rag_ops.triton_kernels`` (see ``pyproject.toml``), never as a top-level module:
other distributions install a top-level module of this name. Importing this package does not import triton, so that
``longlive_rag_ops`` can be imported, and can say why the engine is missing, on a machine without triton.
"""
