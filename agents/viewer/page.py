"""Shows in a browser what a pruned ViT drops of one's own photographs: ``prunevit viewer``.

The page takes a photograph, a model, one or two ways to prune it and a share of the dense compute.
It shows the photograph after each stage with pruned patches faded, and what each model answers,
costs and takes on this machine. It needs the extra ``viewer``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import tyro
from PIL import Image

from prunevit.agents.viewer.comparison import Comparison, Look, compare
from prunevit.agents.viewer.photographs import open_photograph, samples
from prunevit.agents.viewer.picture import draw, milliseconds
from prunevit.agents.viewer.viewed_model import DIGITS, ViewedModel, read_model
from prunevit.choices import check_choice
from prunevit.cli import prog
from prunevit.extras import needs

if TYPE_CHECKING:
    from gradio import Blocks

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OFFERED = (DIGITS, "deit_small_patch16_224")
MODELS_KEPT = 4  # in memory
NONE = "none"
MODELS = "digits, timm's name, or a folder"
METHODS = "what chooses the patches"
OTHERS = "another way"
CSS = ".facts td, .facts th {white-space: nowrap; padding: 4px 10px}"
LEAST_COMPUTE = 0.1


@dataclass
class ViewerConfig:
    """What the page offers, and to whom."""

    model: str = DIGITS
    """The model at first: digits; a run, as runs/NAME; a folder of PrunedViT.save_pretrained; or
    timm's name of a ViT. The page can load others."""
    checkpoint: Path | None = None
    """With timm's name: weights of the ViT, in place of those that timm downloads."""
    img_size: int | None = None
    """With timm's name: image size of the ViT, by default timm's own."""
    host: str = LOOPBACK[0]
    """Address to listen on. On any but this machine's own, everybody who reaches it can use the
    page, which then loads no models but those that it lists."""
    port: int | None = None
    """By default the first free one from 7860 on."""
    upload_mb: int = 20
    """The largest file that is taken, in MB."""
    threads: int | None = None
    """CPU threads. By default torch's own choice."""
    browser: bool = True
    """Open the page in a browser."""


class Viewer:
    """What the page shows, without the page.

    Args:
        config: what it offers.

    Attributes:
        offered: names of the models that it lists.
        takes_any_model: whether it reads others too.
        read: gives the ``ViewedModel`` of a name; raises ValueError or OSError if it can't be read.
    """

    def __init__(self, config: ViewerConfig) -> None:
        self.config = config
        self.offered = tuple(dict.fromkeys((config.model, *OFFERED)))
        self.takes_any_model = config.host in LOOPBACK
        self.read = lru_cache(MODELS_KEPT)(self._read_model)

    def _read_model(self, name: str) -> ViewedModel:
        if not self.takes_any_model:
            check_choice("model", name, self.offered)
        config = self.config
        if name == config.model:
            return read_model(name, config.checkpoint, config.img_size)
        return read_model(name)

    def methods(self, model: str) -> tuple[str, ...]:
        """The ways to prune a model; none if there is no such model, which ``show`` tells."""
        try:
            return self.read(model).methods
        except (ValueError, OSError):
            return ()

    def show(
        self, file: str, model: str, method: str, other: str, compute: float
    ) -> tuple[Image.Image | None, str]:
        """Shows what is pruned of a photograph.

        Args:
            file: the photograph.
            model: the name of a model.
            method: how it is pruned.
            other: another way; ``NONE`` for none.
            compute: share of the dense compute.

        Returns:
            a picture, None if there can be none, and a table or what is wrong, as Markdown.
        """
        try:
            viewed = self.read(model)
            methods = [each for each in (method, other) if each in viewed.methods]
            image = open_photograph(Path(file), Path(file).name)
            found = compare(viewed, image, methods or viewed.methods[:1], compute)
        except (ValueError, OSError) as error:
            return None, f"**{' '.join(str(error).split())}**"
        return draw({"": found}), table(found)


def table(found: Comparison) -> str:
    """The facts of all looks, the dense model's first, as Markdown."""

    def row(look: Look) -> str:
        cells = (
            look.method,
            look.answer,
            f"{found.compute(look):.0%}",
            f"{look.macs / 1e9:.3g}",
            " ".join(map(str, look.patches)),
            milliseconds(look),
            f"{found.dense.seconds / look.seconds:.2f}x",
        )
        return f"| {' | '.join(cells)} |"

    batch = f"batches of {found.at_once} copies" if found.at_once > 1 else "one image at a time"
    return "\n".join(
        [
            "| method | answer | compute | GMACs | patches | ms an image | speed |",
            "|---|---|--:|--:|---|--:|--:|",
            *map(row, (found.dense, *found.looks)),
            "",
            "  \n".join(
                [
                    f"Timed on this machine: {batch}, CPU threads: {torch.get_num_threads()}.",
                    *found.remarks,
                ]
            ),
        ]
    )


def make_page(viewer: Viewer, folder: Path) -> Blocks:
    """Makes the page.

    Args:
        viewer: what it shows.
        folder: where samples are written.

    Raises:
        ImportError: the extra ``viewer`` is missing.
        ValueError: the model that the page begins with can't be read.
        OSError: likewise.
    """
    with needs("viewer"):
        import gradio as gr

    images = samples()
    files = [str(folder / f"{name}.png") for name in images]
    for file, image in zip(files, images.values(), strict=True):
        image.save(file)
    is_digits = viewer.config.model == DIGITS
    first = next(i for i, name in enumerate(images) if name.startswith(DIGITS) == is_digits)
    methods = viewer.read(viewer.config.model).methods

    def methods_of(model: str) -> tuple[Any, Any]:
        known = viewer.methods(model)
        return (
            gr.Dropdown(choices=list(known), value=known[0] if known else None),
            gr.Dropdown(choices=[NONE, *known], value=NONE),
        )

    def pick(chosen: int) -> tuple[str, None]:
        return files[chosen], None

    def show(upload: str | None, sample: str, *choices: Any) -> tuple[Image.Image | None, str]:
        return viewer.show(upload or sample, *choices)

    # uploads are deleted after an hour
    with gr.Blocks(
        title="prunevit", analytics_enabled=False, delete_cache=(3600, 3600), fill_width=True
    ) as page:
        sample = gr.State(files[first])
        gr.Markdown("## Which patches a ViT can do without")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                # not gr.Image: Gradio and the browser would decode whatever it is
                upload = gr.File(label="Photograph", file_types=["image"], height=160)
                gallery = gr.Dataset(
                    label="Samples",
                    components=[gr.Image(visible=False)],
                    samples=[[file] for file in files],
                    samples_per_page=len(files),
                    type="index",
                )
            with gr.Column(scale=3):
                with gr.Row():
                    model = gr.Dropdown(
                        list(viewer.offered),
                        value=viewer.config.model,
                        label="Model",
                        info=MODELS,
                        allow_custom_value=viewer.takes_any_model,
                    )
                    method = gr.Dropdown(
                        list(methods), value=methods[0], label="Pruned by", info=METHODS
                    )
                    other = gr.Dropdown(
                        [NONE, *methods], value=NONE, label="Beside it", info=OTHERS
                    )
                compute = gr.Slider(
                    LEAST_COMPUTE, 1, 0.4, step=0.01, label="Compute, share of the dense model's"
                )
                picture = gr.Image(
                    show_label=False,
                    format="png",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                )
                facts = gr.Markdown(elem_classes="facts")
        # one at a time, so that nothing else runs while models are timed
        shown: dict[str, Any] = {
            "fn": show,
            "inputs": [upload, sample, model, method, other, compute],
            "outputs": [picture, facts],
            "concurrency_id": "models",
        }
        gr.on(
            [page.load, upload.upload, upload.clear, method.select, other.select, compute.input],
            trigger_mode="always_last",
            **shown,
        )
        gallery.click(pick, gallery, [sample, upload]).then(**shown)
        model.change(methods_of, model, [method, other], concurrency_id="models").then(**shown)
    return page


def serve(config: ViewerConfig) -> None:
    """Serves the page until it is interrupted.

    Raises:
        ImportError: the extra ``viewer`` is missing.
        ValueError: the model can't be read.
        OSError: the port is taken.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    viewer = Viewer(config)
    with TemporaryDirectory() as folder:
        page = make_page(viewer, Path(folder))
        import gradio as gr

        page.launch(
            quiet=True,
            prevent_thread_lock=True,
            server_name=config.host,
            server_port=config.port,
            inbrowser=config.browser,
            max_file_size=f"{config.upload_mb}mb",
            # Gradio's own theme fetches its fonts
            theme=gr.themes.Default(font="system-ui", font_mono="ui-monospace"),
            css=CSS,
            share=False,
            footer_links=[],
        )
        print(f"{page.local_url} (Ctrl+C ends it)", flush=True)
        page.block_thread()


def main(arguments: Sequence[str] | None = None) -> None:
    """``prunevit viewer``."""
    try:
        serve(tyro.cli(ViewerConfig, args=arguments, description=__doc__, prog=prog()))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
