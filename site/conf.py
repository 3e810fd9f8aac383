"""Settings of the site for Sphinx. `site/build.py` lays out the pages and calls it; nothing is executed."""

import configparser
from pathlib import Path

HERE = Path(__file__).resolve().parent
settings = configparser.ConfigParser(delimiters=["="])
settings.read(HERE.parent / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project = settings["title"]
author = settings["author"]
release = settings["version"]
copyright = settings["copyright"]
language = "en"
root_doc = "index"

extensions = ["myst_nb", "sphinx.ext.mathjax"]
nb_execution_mode = "off"
nb_merge_streams = True
# tables in outputs, too: the default knows none
nb_render_markdown_format = "myst"
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
# text stands in place of a widget, which has no kernel here
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]
myst_enable_extensions = ["amsmath", "deflist", "dollarmath", "html_image"]
myst_heading_anchors = 4

html_theme = "sphinx_book_theme"
html_title = settings["title"]
html_static_path = [str(HERE / "static")]
html_css_files = ["site.css"]
html_js_files = ["copy.js", "sort.js"]
html_copy_source = True
html_show_sourcelink = False
# formulas are drawn without a network: MathJax lies beside the pages
mathjax_path = "mathjax/tex-svg.js"

html_theme_options = {
    "use_download_button": True,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    # the solutions stand in the contents of the solutions alone: with them, half of a build goes there
    "collapse_navbar": True,
    # one search field, the one beside the contents
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
}
# a repository that others can reach: then there are links to it, and to Colab
if "localhost" not in settings["git_url"]:
    html_theme_options |= {
        "repository_url": settings["git_url"],
        "repository_branch": settings["branch"],
        "use_repository_button": True,
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    }
