"""The documentation's site: `make docs` builds it with Sphinx from the Markdown pages and the package's docstrings."""

import re

import csg_ext

project = "csg_ext"
author = "the csg_ext authors"
release = version = csg_ext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
nitpicky = True
# Names of other projects, whose inventories would have to be downloaded, with and without their modules.
_FOREIGN = "torch|nn|numpy|np|pl|lightning|torchmetrics|matplotlib|PIL|pathlib|collections"
_SHORT = "Tensor|Module|NDArray|ArrayLike|Axes|Figure|PARAM_LIST"
# Types of arguments that are made by the package itself, never by its users.
_INNER = r"Images|(csg_ext\.data\.index\.)?ImageIndex|ArrayList|csg_ext\.report\.collect\.Arm"
nitpick_ignore_regex = [("py:.*", rf"({_FOREIGN})(\..*)?|{_SHORT}|{_INNER}")]

# Headings become anchors under the names that GitHub gives them.
myst_heading_anchors = 4

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 100
napoleon_numpy_docstring = False
default_role = "code"  # `single` backquotes, as in Markdown

toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_title = f"csg_ext {release}"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False


def escape(app, what, name, obj, options, lines):
    """Docstrings are plain text but for their code and roles: (N, K, *spatial) and |cosine| mean what they show."""
    for i, line in enumerate(lines):
        if line.lstrip().startswith((">>>", "...")):
            continue
        code_apart = re.split(r"(``.*?``|`.*?`)", line)
        lines[i] = "".join(p if p.startswith("`") else re.sub(r"([*|])", r"\\\1", p) for p in code_apart)


def skip(app, what, name, obj, skip, options):
    """The fields of a named tuple stand in its signature; "Alias for field number 0" says nothing more."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def setup(app):
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon, which escapes on its own
    app.connect("autodoc-skip-member", skip)
