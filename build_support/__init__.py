"""Builds csg_ext: the PEP 517 backend (backend.py) and the compiling of csrc/ (native.py). Needs setuptools alone."""
