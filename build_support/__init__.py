"""Builds csg_ext: the PEP 517 backend (backend.py), the compiling of csrc/ (native.py), what that needs (toolchain.py).

Needs setuptools alone.
"""
