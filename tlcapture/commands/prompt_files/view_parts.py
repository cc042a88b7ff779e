"""Which parts of attention and logit lens are kept, and in which form their files are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tlcapture.commands.prompt_files.known_views import KnownView
from tlcapture.errors import InputError
from tlcapture.views.logit_lens import TOP_K


@dataclass(frozen=True)
class ViewParts:
    """The parts of the views that are kept; by default all layers, the likeliest `TOP_K` predictions, and as JSON.

    Attributes:
        attention_layers: layers whose attention patterns are kept; all where empty.
        lens_layers: layers whose predictions are kept; all where empty.
        lens_top: how many predictions of each layer are kept.
        form: `json` or `compact`; `None` writes JSON, or the compact form if JSON would be too large.
    """

    attention_layers: tuple[int, ...] = ()
    lens_layers: tuple[int, ...] = ()
    lens_top: int = TOP_K
    form: str | None = None

    def check_written(self, *, attention: bool, logit_lens: bool) -> None:
        """Raise `InputError` for parts of a view that is not written."""
        for option, is_given, is_written, view in (
            ("--attention-layers", bool(self.attention_layers), attention, "--attention"),
            ("--lens-layers", bool(self.lens_layers), logit_lens, "--logit-lens"),
            ("--lens-top", self.lens_top != TOP_K, logit_lens, "--logit-lens"),
        ):
            if is_given and not is_written:
                raise InputError(f"{option} keeps a part of what {view} writes: add {view}")

    def are_lacked_by(self, view: KnownView, d_vocab: Callable[[], int]) -> bool:
        """Whether an existing file of attention or logit lens lacks a layer, or predictions that were asked for.

        `d_vocab` gives the number of predictions that there are.
        """
        wanted = (self.lens_layers if view.top_k else self.attention_layers) or range(view.n_layers)
        if not set(wanted) <= set(view.layers):
            return True
        return bool(view.top_k) and self.lens_top != TOP_K and view.top_k < self.lens_top and view.top_k < d_vocab()
