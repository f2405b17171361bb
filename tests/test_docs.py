"""The snippets of the README and of the pages in docs/ run as they stand."""

import json
import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

import prunevit.agents
import prunevit.envs
from prunevit.envs.vit.timm_models import supported

DOCS = Path(__file__).parents[1] / "docs"
# pages with snippets, and what they need
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
PAGES = [
    "../README",
    "environment",
    "gymnasium",
    "pettingzoo",
    "pruned_vit",
    "quickstart",
    "sb3",
    "tutorials/write_a_reward",
    "tutorials/write_a_policy",
    "tutorials/your_own_algorithm",
    "tutorials/read_a_training",
    "tutorials/support_a_backbone",
    pytest.param("hugging_face", marks=pytest.mark.integration("transformers")),
    pytest.param("deployment", marks=pytest.mark.integration("onnx")),
    pytest.param("torchrl", marks=pytest.mark.integration("torchrl")),
    pytest.param("benchmarl", marks=pytest.mark.integration("benchmarl")),
    pytest.param("rllib", marks=pytest.mark.integration("rllib")),
]
# their snippets go on from one to the next; on other pages each stands alone
GO_ON = {page for page in PAGES if page == "quickstart" or str(page).startswith("tutorials/")}
# a reader wants a training, a test its first round
SHORTER = {"benchmarl": ("config.max_n_iters, config.max_n_frames", "= 100, None", "= 1, None")}
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="needs the checkout")


def snippets(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text("utf-8"), re.DOTALL)


@pytest.fixture
def one_core(request):
    """RLlib would otherwise start Ray for all cores there are."""
    if "rllib" not in request.node.name:
        yield
        return
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_snippets_run(page, one_core, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supported, "SUPPORTED", supported.SUPPORTED)  # a page adds to it
    found = snippets(page)
    assert found
    variables = {}
    for code in found:
        if page not in GO_ON:
            variables = {}
        if page in SHORTER:
            line, long, short = SHORTER[page]
            assert line in code
            assert long in code
            code = code.replace(long, short)
        exec(compile(code, f"{page}.md", "exec"), variables)


@pytest.mark.learning
@pytest.mark.parametrize(
    ("name", "long", "short"),
    [
        ("prune_a_vit", "size=500)\n", "size=500)\n"),
        ("train_a_policy", "iterations=100,", "iterations=12, num_envs=64,"),
    ],
)
def test_notebooks_run_from_top_to_bottom(name, long, short, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    cells = json.loads((DOCS / "notebooks" / f"{name}.ipynb").read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sum(long in cell for cell in code) == 1
    scope = {}
    for cell in code:
        exec(compile(cell.replace(long, short), f"{name}.ipynb", "exec"), scope)
    plt.close("all")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_the_site_shows_what_a_whole_run_of_a_notebook_put_out(notebook):
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", ()) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)


def test_the_site_has_every_page():
    index = (DOCS / "index.md").read_text("utf-8")
    listed = set(re.findall(r"^[\w/]+$", index, re.MULTILINE))
    files = [*DOCS.rglob("*.md"), *NOTEBOOKS]
    pages = {file.relative_to(DOCS).with_suffix("").as_posix() for file in files}
    assert pages - {"index"} == listed


@pytest.mark.parametrize("package", [prunevit.envs, prunevit.agents])
def test_the_api_reference_has_every_public_name(package):
    pages = "\n".join(page.read_text("utf-8") for page in (DOCS / "api").glob("*.md"))
    modules = set(re.findall(r"automodule:: (\S+)", pages))
    public = {name: getattr(package, name).__module__ for name in package.__all__}
    assert not {name: module for name, module in public.items() if module not in modules}


def test_every_page_with_snippets_is_listed():
    listed = {page if isinstance(page, str) else page.values[0] for page in PAGES}
    pages = {file.relative_to(DOCS).with_suffix("").as_posix() for file in DOCS.rglob("*.md")}
    assert {page for page in pages if snippets(page)} == listed - {"../README"}


def test_the_api_reference_has_what_snippets_import():
    # packages: what they offer is looked up by its module
    modules = {"prunevit", "prunevit.agents", "prunevit.envs", "prunevit.envs.vit.timm_models"}
    # these need libraries that the site is built without
    modules |= {f"prunevit.envs.adapters.{name}" for name in ("benchmarl", "rllib", "torchrl")}
    for page in (DOCS / "api").glob("*.md"):
        modules |= set(re.findall(r"automodule:: (\S+)", page.read_text("utf-8")))
    for page in PAGES:
        name = page if isinstance(page, str) else page.values[0]
        for code in snippets(name):
            imported = set(re.findall(r"^from (prunevit\S*) import", code, re.MULTILINE))
            assert imported <= modules, name


def anchors(page):
    """The anchors of a page's headings, as GitHub and MyST name them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_and_files_lead_somewhere():
    root = DOCS.parent
    for page in [*root.glob("*.md"), *DOCS.rglob("*.md")]:
        text = page.read_text("utf-8")
        for link, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor:
                assert anchor in anchors(target), f"{page.name}: {link}#{anchor}"
    assert len((root / "README.md").read_text("utf-8").splitlines()) <= 150  # one screen
