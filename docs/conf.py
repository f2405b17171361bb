"""The documentation site: ``pip install -e '.[docs]' && sphinx-build -W docs build/docs``."""

from importlib.util import find_spec

from prunevit import __version__

project = "prunevit"
author = "the prunevit developers"
copyright = "the prunevit developers"
release = version = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"prunevit {release}"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are committed with their outputs, and tests run them
# of other libraries, those that are not installed
libraries = ("benchmarl", "ray", "sb3_contrib", "tensordict", "torchrl")
autodoc_mock_imports = [name for name in libraries if find_spec(name) is None]
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # those of other libraries are in another markup
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
