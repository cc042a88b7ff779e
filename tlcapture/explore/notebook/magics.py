"""The IPython extension: `%load_ext tlcapture` defines `%capture_prompt`.

    %capture_prompt "How do tides work?"
    %capture_prompt -t behavioral/refusal --max-new-tokens 80 "How do I pick a lock?"
    %capture_prompt --samples 4 --top-p 0.9 --steer behavioral/refusal:+0.2@16 "How do I pick a lock?"

It captures the prompt, shows the tokens in colour and assigns the capture to `cap`, and all samples to `caps`.
`%%capture_prompt` takes the prompt from the cell.
"""

from __future__ import annotations

import argparse
import shlex
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import Magics, line_cell_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments
from IPython.display import display

from tlcapture.errors import TlcaptureError
from tlcapture.explore.experiment import Experiment
from tlcapture.explore.notebook.completion import complete_in
from tlcapture.models.checkpoints.embedded import NAME as EMBEDDED
from tlcapture.models.lazy_model import LazyModel
from tlcapture.names import Trait
from tlcapture.prompts.template_args import parse_template_arg
from tlcapture.text import printable
from tlcapture.traits.interventions.requested import Ablate, Cap, Steer, TraitIntervention
from tlcapture.traits.vector_files import traits_with_vectors

if TYPE_CHECKING:
    from tlcapture.explore.live.live_capture import LiveCapture


def _read_by(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A reader of an option's value, whose errors argparse prints."""

    def read(text: str) -> Any:
        try:
            return parse(text)
        except TlcaptureError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _repeatable(option: str, metavar: str, parse: Callable[[str], Any], text: str, dest: str | None = None) -> Any:
    """An option that may be given several times."""
    more = {} if dest is None else {"dest": dest}
    return argument(option, action="append", type=_read_by(parse), metavar=metavar, help=f"{text} Repeatable.", **more)


def _change(option: str, kind: type[TraitIntervention], text: str) -> Any:
    """An intervention; all kinds share one list, in the order in which they are given."""
    return _repeatable(option, kind.form, kind.parse, text, dest="interventions")


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Register `%capture_prompt`, and complete traits and points; called by `%load_ext tlcapture`."""
    shell.register_magics(CaptureMagics)
    complete_in(shell)


@magics_class
class CaptureMagics(Magics):
    """The magic `%capture_prompt`."""

    def __init__(self, shell: InteractiveShell):
        super().__init__(shell)
        self._embedded = LazyModel(lambda: _load(EMBEDDED), EMBEDDED)

    @property
    def _namespace(self) -> dict[str, Any]:
        """The user's variables."""
        assert self.shell is not None
        return self.shell.user_ns

    @magic_arguments()
    @argument("text", nargs="*", help="The prompt, in quotes; %%%%capture_prompt takes the cell.")
    @argument("-t", "--trait", help="Colour the tokens by their projection onto this trait.")
    @argument(
        "-n",
        "--max-new-tokens",
        type=int,
        help="Maximum length of the response. (default 50, or 1024 where the chat template makes it think)",
    )
    @argument(
        "--temperature",
        type=float,
        help="Sampling temperature; 0 is greedy. (default 0.7, or the checkpoint's own with --sampling checkpoint)",
    )
    @argument("--seed", type=int, default=0, help="Sampling seed. (default 0)")
    @argument("--sampling", choices=["plain", "checkpoint"], default="plain", help="checkpoint: its generation config.")
    @argument("--top-p", type=float, metavar="P", help="Sample from the most likely tokens that add up to P.")
    @argument("--top-k", type=int, metavar="K", help="Sample from the K most likely tokens.")
    @argument("--min-p", type=float, metavar="P", help="Sample from tokens at least P times as likely as the first.")
    @argument("--repetition-penalty", type=float, metavar="X", help="Make tokens that occurred before less likely.")
    @_repeatable("--stop", "TEXT", str, "End a response with the token that completes TEXT.")
    @argument("--samples", type=int, metavar="N", help="N responses to the prompt, all of them in `caps`.")
    @argument("--thinking", choices=["on", "off"], help="Turn thinking on or off, if the chat template can.")
    @argument("--vector-experiment", metavar="NAME", help="Use vectors of experiment NAME, or packaged.")
    @_repeatable("--template-arg", "KEY=VALUE", parse_template_arg, "Another value for the chat template.")
    @_change("--steer", Steer, "Add COEFFICIENT typical residual norms along a trait's vector.")
    @_change("--ablate", Ablate, "Remove the component along a trait's vector.")
    @_change("--cap", Cap, "Hold the projection onto a trait's vector at VALUE or below.")
    @line_cell_magic
    def capture_prompt(self, line: str, cell: str | None = None) -> None:
        """Capture a prompt, show its tokens in colour, and assign the capture to `cap`, all samples to `caps`.

        The model is the variable `model` if it exists, else that of the experiment `exp`, else the embedded one.
        Projections and interventions use the vectors of `exp`, unless `--vector-experiment` names another experiment.
        """
        options = self.capture_prompt.parser.parse_args(_words(line))
        text = " ".join(options.text) if cell is None else cell.strip("\n")
        if cell is not None and options.text:
            raise UsageError("%%capture_prompt takes the prompt from the cell: remove the text from its first line")
        if not text.strip():
            raise UsageError('no prompt: %capture_prompt "How do tides work?"')
        if options.max_new_tokens is not None and options.max_new_tokens < 0:
            raise UsageError(f"--max-new-tokens {options.max_new_tokens}: expected a number of at least 0")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                exp, other = self._experiment(), options.vector_experiment
                vectors = exp if other is None else Experiment(other, None if exp is None else exp.root)
                if options.trait is not None:
                    _check_trait(vectors, options.trait)  # before the model runs, not after
                caps = self._capture(exp, vectors, text, options)
                tokens = [cap.coloured(options.trait, vector_experiment=other) for cap in caps]
        except TlcaptureError as error:
            raise UsageError(printable(str(error))) from None
        for warning in caught:
            if issubclass(warning.category, UserWarning):
                print(f"warning: {printable(str(warning.message))}")
        self._namespace.update(cap=caps[0], caps=caps)
        display(*tokens)

    def _experiment(self) -> Experiment | None:
        exp = self._namespace.get("exp")
        return exp if isinstance(exp, Experiment) else None

    def _capture(
        self, exp: Experiment | None, vectors: Experiment | None, text: str, options: Any
    ) -> list[LiveCapture]:
        from tlcapture.explore.live.live_capture import capture

        config = None if exp is None else exp.config
        captures = capture(
            self._model(exp),
            text,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
            sampling=options.sampling,
            top_p=options.top_p,
            top_k=options.top_k,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            stop=options.stop or (),
            samples=options.samples,
            system_prompt=None if config is None else config.system_prompt,
            chat_template=None if config is None else config.use_chat_template,
            thinking=options.thinking,
            template_args=dict(options.template_arg or ()),
            vectors=vectors,
            interventions=options.interventions or (),
        )
        return list(captures)

    def _model(self, exp: Experiment | None) -> Any:
        """The variable `model`, the experiment's model, or the embedded one."""
        model = self._namespace.get("model")
        if model is None:
            named = exp is not None and (exp.config.inference_model or exp.config.extraction_model)
            return exp.model if exp is not None and named else self._embedded
        from tlcapture.models.loading import Model

        if not isinstance(model, Model | LazyModel) and not hasattr(model, "hook_dict"):
            raise TlcaptureError(
                f"the variable 'model' is a {type(model).__name__}, not a model: assign load_model(...) or delete it"
            )
        return model


def _check_trait(exp: Experiment | None, trait: str) -> None:
    if exp is None:
        raise TlcaptureError(
            f"--trait {trait}: no vectors: set exp = Experiment(...) to use its own, or add --vector-experiment NAME"
        )
    traits_with_vectors(exp.layout, [Trait.parse(trait)])


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise UsageError(
            f"{error}: put the prompt in double quotes, or in a cell of its own below %%capture_prompt"
        ) from None


def _load(name: str) -> Any:
    from tlcapture.models.loading import load_model

    return load_model(name)
